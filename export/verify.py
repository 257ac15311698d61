"""Whether an exported model is the one trained: the same tokens and logits in `transformers` on PyTorch."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.config import load
from core.errors import UserError
from core.run import RunFolder
from llm.chat import encode_chat
from llm.config import Experiment
from llm.generate import encode_prompt
from llm.model.config import ModelConfig
from llm.tokenizer.tokenizer import Tokenizer

LIMIT = 1e-4  # on the difference of two logits
_LONGEST = 1024  # tokens
_PROMPTS = (
    "The",
    "def read_file(path):",
    "What is the capital of France, and what is it known for?",
    "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich. 東京は日本の首都です。 😀\n\n\ttabs  and   spaces",
    inspect.getsource(argparse),  # a text of many tokens, cut to the model's context
)
_CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who wrote Faust?"})
_log = logging.getLogger(__name__)


class Verified(NamedTuple):
    """What was compared, and how far the two were apart."""

    prompts: int
    tokens: int
    difference: float  # the largest of two logits
    largest: float  # logit, in magnitude
    same_choice: float  # share of positions where both have the same likeliest token

    def words(self, rounded: str) -> str:
        """For the command line; `rounded` says what the weights were rounded to."""
        return (
            f"logits{rounded} in float32, {self.prompts} prompts of {self.tokens:,} tokens: largest "
            f"difference {self.difference:.2e} (of logits up to {self.largest:.1f}), same likeliest token at "
            f"{self.same_choice:.2%}"
        )


def verify(run: RunFolder, step: int, folder: Path, dtype: str = "float32") -> Verified:
    """Compare the logits of a run's JAX model with those of `transformers` from `folder`, in float32.

    Args:
        step: of the run's checkpoint that `folder` was made from, or that was made from it.
        dtype: of the export: both sides have the values rounded to it. Experts drop no token on either side.

    Raises:
        UserError: if `transformers` lacks a tensor, or reads the prompts as other tokens.
    """
    torch, transformers = libraries()
    experiment, tokenizer = load(Experiment, run.config), Tokenizer.load(run.tokenizer)
    _check_tokens(
        tokenizer, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True), folder
    )
    rows = [encode_prompt(tokenizer, text)[: min(_LONGEST, experiment.model.max_length)] for text in _PROMPTS]
    theirs = _logits_in_torch(torch, transformers, folder, rows)
    ours = _logits_in_jax(run, step, experiment.model, dtype, rows)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, theirs, strict=True)])
    largest = max(float(np.abs(a).max()) for a in theirs)
    _log.info("verified with transformers %s, torch %s", transformers.__version__, torch.__version__)
    return Verified(len(rows), sum(map(len, rows)), difference, largest, float(same.mean()))


def libraries() -> tuple[Any, Any]:
    """torch and transformers. Raises `UserError` where one is missing."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"--verify needs {error.name}: pip install -e '.[export]'") from None
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def _check_tokens(tokenizer: Tokenizer, theirs: Any, folder: Path) -> None:
    for text in _PROMPTS:
        ids, bare, whole = tokenizer.encode(text), *(
            theirs(text, add_special_tokens=special, verbose=False).input_ids for special in (False, True)
        )  # fmt: skip
        # Many tokenizers add nothing in front; twice is the mistake that is made.
        if bare != ids or whole not in (ids, encode_prompt(tokenizer, text)):
            raise UserError(
                f"transformers reads {text[:40]!r} in {folder} as {whole[:8]}..., and this program as "
                f"{encode_prompt(tokenizer, text)[:8]}...: the tokenizer is not exported right"
            )
    if theirs.chat_template is not None:
        ids = theirs.apply_chat_template([*_CHAT], add_generation_prompt=True, return_dict=False)
        if ids != encode_chat(tokenizer, _CHAT):
            raise UserError(f"transformers renders a conversation by {folder} as {ids}, not as in training")


def _logits_in_torch(torch: Any, transformers: Any, folder: Path, rows: list[list[int]]) -> list[np.ndarray]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    odd = {kind: sorted(names) for kind, names in info.items() if names}
    if odd:
        raise UserError(f"transformers does not find the tensors that it wants in {folder}: {odd}")
    with torch.inference_mode():
        return [model.eval()(torch.tensor([ids])).logits[0].numpy() for ids in rows]


def _logits_in_jax(
    run: RunFolder, step: int, config: ModelConfig, dtype: str, rows: list[list[int]]
) -> list[np.ndarray]:
    import jax
    import jax.numpy as jnp

    from core.checkpoint import Checkpointer
    from llm.model.transformer import blueprint

    if config.moe is not None:
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, capacity=None))
    model = blueprint(config)
    with Checkpointer(run.checkpoints) as checkpointer:
        params = checkpointer.restore_params(step, model.shapes)
    params = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)

    @jax.jit
    def logits(params, tokens):
        bound = model.bind(params)
        return bound.logits(bound(tokens, jnp.arange(tokens.shape[1])[None], None).hidden)

    found = []
    with jax.default_matmul_precision("highest"):
        for ids in rows:  # what stands after a token changes nothing for it, so two lengths are compiled
            length = 128 if len(ids) <= 128 <= config.max_length else min(_LONGEST, config.max_length)
            padded = np.pad(np.array([ids], np.int32), ((0, 0), (0, length - len(ids))))
            found.append(np.asarray(logits(params, padded)[0, : len(ids)]))
    return found
