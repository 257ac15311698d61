"""Byte-level BPE, trained and encoded from scratch; and any tokenizer, run by Hugging Face's engine."""

from llm.tokenizer.bpe import BPE, SPECIAL_TOKENS
from llm.tokenizer.files import keep, save
from llm.tokenizer.tokenizer import Tokenizer
from llm.tokenizer.trainer import train_bpe

__all__ = ["BPE", "SPECIAL_TOKENS", "Tokenizer", "keep", "save", "train_bpe"]
