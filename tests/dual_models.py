"""Dual encoders of Hugging Face, small and of odd shapes, with random weights; and folders of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
import transformers
from tiny import copy_corpus

from clip.model.config import CLIPConfig, ImageConfig, TextConfig
from llm.tokenizer import save, train_bpe

VOCAB = 283  # 256 bytes, special tokens, and a few merges
IMAGE = {
    "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6,
    "image_size": 15, "patch_size": 5, "layer_norm_eps": 1e-3,
}  # fmt: skip
TEXT = {
    "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCAB, "max_position_embeddings": 13, "layer_norm_eps": 1e-3,
}  # fmt: skip
_OURS_IMAGE = ImageConfig(
    embed_dim=36, num_layers=3, num_heads=6, mlp_dim=52, size=15, patch_size=5, norm_epsilon=1e-3
)
_OURS_TEXT = TextConfig(
    embed_dim=24, num_layers=2, num_heads=4, mlp_dim=44, vocab_size=VOCAB, length=13, norm_epsilon=1e-3
)
_HALVES = (0.5, 0.5, 0.5)


def _clip(activation: str, **text) -> tuple[CLIPConfig, transformers.PreTrainedConfig]:
    ours = CLIPConfig(
        image=dataclasses.replace(_OURS_IMAGE, activation=activation),
        text=dataclasses.replace(_OURS_TEXT, activation=activation),
        embed_dim=20,
    )
    act = {"hidden_act": activation}
    theirs = transformers.CLIPConfig(
        text_config=TEXT | act | text, vision_config=IMAGE | act, projection_dim=20
    )
    return ours, theirs


def _siglip() -> tuple[CLIPConfig, transformers.PreTrainedConfig]:
    change = {"activation": "gelu_tanh"}
    ours = CLIPConfig(
        image=dataclasses.replace(_OURS_IMAGE, pool="attention", mean=_HALVES, std=_HALVES, **change),
        text=dataclasses.replace(_OURS_TEXT, pool="last", causal=False, **change),
        embed_dim=36,
        logit_bias=True,
    )
    ends = {"bos_token_id": None, "eos_token_id": None}
    theirs = transformers.SiglipConfig(text_config=TEXT | ends | {"projection_size": 36}, vision_config=IMAGE)
    return ours, theirs


END = 7  # of the text, in rows that tests make
CASES = {
    "clip-quick": _clip("quick_gelu", eos_token_id=END),
    "clip-gelu": _clip("gelu", eos_token_id=END),
    "siglip": _siglip(),
}


def make(name: str, theirs: transformers.PreTrainedConfig | None = None) -> transformers.PreTrainedModel:
    """A model of this case in float32, all of whose weights are random."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(theirs or CASES[name][1], attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # also the biases and norms that start at 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.float().eval()


def write(name: str, folder: Path, corpus: Path, **options) -> Path:
    """The checkpoint of a case as transformers writes it, with a tokenizer of ours, which fills texts up with
    their end as SigLIP's does, and without an image processor."""
    make(name).save_pretrained(folder, **options)
    texts = [path.read_text() for path in copy_corpus(corpus).glob("*.py")]
    save(train_bpe(texts, VOCAB), folder)
    roles = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | {"pad_token": roles["eos_token"]}))
    return folder
