"""Byte-level BPE: trained and encoded from scratch, and run in bulk by the engine of Hugging Face."""

from llm.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
