"""Whether an exported dual encoder is the one trained: the same pixels, tokens, embeddings and logits in
`transformers` on PyTorch.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clip.config import Experiment
from clip.data.captions import encode_captions
from clip.data.tokenizer import CaptionTokenizer
from clip.model.config import CLIPConfig
from core.config import load
from core.errors import UserError
from core.run import RunFolder
from export.dual import read_tokenizer
from export.families.dual import PREPROCESSOR
from export.verify import libraries

if TYPE_CHECKING:
    from core.module import Blueprint

_CAPTIONS = (
    "a red seven above a green two",
    "Two dogs run over wet sand; one of them carries a ball.",
    "ein Café am Fluß, 東京 😀",
    "dog",
    "a photo of " + ", ".join(["a very long list"] * 40),  # more tokens than any model takes
)
_IMAGES = 4
_PIXELS = 1e-5  # difference of two pixels after normalization: rounding, and no more
_log = logging.getLogger(__name__)


class Verified(NamedTuple):
    """What was compared, and how far the two were apart."""

    images: int
    captions: int
    difference: float  # the largest of two logits, or of two components of embeddings
    embeddings: float  # the latter alone
    largest: float  # logit, in magnitude
    same_choice: float  # share of images for which both have the same likeliest caption

    def words(self, rounded: str) -> str:
        """For the command line; `rounded` says what the weights were rounded to."""
        return (
            f"logits{rounded} in float32, {self.images} images by {self.captions} captions: largest "
            f"difference {self.difference:.2e} (of logits up to {self.largest:.1f}), {self.embeddings:.2e} "
            f"between embeddings, same likeliest caption for {self.same_choice:.2%}"
        )


def verify_dual(run: RunFolder, step: int, folder: Path, dtype: str = "float32") -> Verified:
    """Compare embeddings and logits of a run's JAX model with those of `transformers`, in float32.

    Args:
        step: of the run's checkpoint that `folder` was made from, or that was made from it.
        dtype: of the export: both sides have the values rounded to it.

    Raises:
        UserError: if `transformers` lacks a tensor, or reads the captions as other tokens, or an image as
            other pixels.
    """
    torch, transformers = libraries()
    config = load(Experiment, run.config).model
    tokenizer = read_tokenizer(run.tokenizer)
    tokens, ends = encode_captions(tokenizer, _CAPTIONS, config.text.length)
    _check_tokens(transformers, folder, tokenizer, tokens, ends)
    size = config.image.size
    images = np.random.default_rng(0).integers(0, 256, (_IMAGES, size, size, 3)).astype(np.uint8)
    ours = _in_jax(run, step, config, dtype, images, tokens, ends)
    _check_pixels(transformers, folder, images, ours[0])
    theirs = _in_torch(torch, transformers, folder, ours[0], tokens)
    apart = [float(np.abs(a - b).max()) for a, b in zip(ours[1:], theirs, strict=True)]
    same = ours[-1].argmax(-1) == theirs[-1].argmax(-1)
    largest = float(np.abs(theirs[-1]).max())
    _log.info("verified with transformers %s, torch %s", transformers.__version__, torch.__version__)
    return Verified(len(images), len(tokens), max(apart), max(apart[:2]), largest, float(same.mean()))


def _check_tokens(
    transformers: Any, folder: Path, tokenizer: CaptionTokenizer, tokens: np.ndarray, ends: np.ndarray
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = theirs(
        list(_CAPTIONS), padding="max_length", max_length=tokens.shape[1], truncation=True
    ).input_ids
    for caption, ours, end, their in zip(_CAPTIONS, tokens, ends, found, strict=True):
        # What follows the end is padding, whose id an import may have otherwise.
        if ours[: end + 1].tolist() != their[: end + 1]:
            raise UserError(
                f"transformers reads {caption[:40]!r} in {folder} as {their[:8]}..., and this program as "
                f"{ours[:8].tolist()}...: the tokenizer is not exported right"
            )


def _check_pixels(transformers: Any, folder: Path, images: np.ndarray, ours: np.ndarray) -> None:
    if not (folder / PREPROCESSOR).is_file():
        return  # of an import: nothing says how its images are read
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        theirs = processor(list(images), return_tensors="np")["pixel_values"]
    except ImportError as error:
        _log.warning("pixels are not compared: %s", str(error).strip().splitlines()[0])
        return
    theirs = np.asarray(theirs).transpose(0, 2, 3, 1)
    if theirs.shape != ours.shape or not np.abs(theirs - ours).max() < _PIXELS:
        raise UserError(
            f"transformers makes other pixels of an image by {folder / PREPROCESSOR} than training did"
        )


def _in_torch(
    torch: Any, transformers: Any, folder: Path, pixels: np.ndarray, tokens: np.ndarray
) -> list[np.ndarray]:
    model, info = transformers.AutoModel.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    odd = {kind: sorted(names) for kind, names in info.items() if names}
    odd = {
        kind: kept for kind, names in odd.items() if (kept := [n for n in names if "position_ids" not in n])
    }
    if odd:
        raise UserError(f"transformers does not find the tensors that it wants in {folder}: {odd}")
    with torch.inference_mode():
        out = model.eval()(
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)), input_ids=torch.tensor(tokens).long()
        )
    return [part.numpy() for part in (out.image_embeds, out.text_embeds, out.logits_per_image)]


def _in_jax(
    run: RunFolder,
    step: int,
    config: CLIPConfig,
    dtype: str,
    images: np.ndarray,
    tokens: np.ndarray,
    ends: np.ndarray,
) -> list[np.ndarray]:
    """Pixels, embeddings of images and of texts, logits."""
    import jax
    import jax.numpy as jnp

    from core.checkpoint import Checkpointer

    model, forward = _program(config)
    with Checkpointer(run.checkpoints) as checkpointer:
        params = checkpointer.restore_params(step, model.shapes)
    params = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        return [np.asarray(part) for part in forward(params, images, tokens, ends)]


@functools.cache
def _program(config: CLIPConfig) -> tuple[Blueprint, Any]:
    import jax

    from clip.model.model import blueprint, pixels

    model = blueprint(config)

    @jax.jit
    def forward(params, images, tokens, ends):
        bound, x = model.bind(params), pixels(images, config.image)
        image, text = bound.encode_image(x), bound.encode_text(tokens, ends)
        return x, image, text, bound.logits(image, text)

    return model, forward
