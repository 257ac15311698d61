"""A split as a model sees it: embeddings of both towers, retrieval, zero-shot classification, loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clip.data.config import DataConfig
from clip.data.split import Classes, Split
from clip.eval.embed import make_embed
from clip.eval.retrieval import Pool, pool, ranks, recalls
from clip.eval.zero_shot import Classification, class_embeddings, classify
from clip.loss import sigmoid_loss, softmax_loss
from clip.model.config import CLIPConfig
from core.mesh import local_rows, mesh_parts, put_rows, shardings
from core.module import Blueprint, Params
from llm.tokenizer import Tokenizer


class Measured(NamedTuple):
    """What a model makes of N examples of a split.

    Attributes:
        indices: which examples.
        images, texts: embeddings of the images, and of the captions of `pool`.
        labels: the class of each image; -1 where it has none.
        classes: embeddings of the classes; None of a split without classes.
        loss: contrastive, over batches as in training with the first caption of each image; over all N where
            these are fewer, and then lower than training's would be; NaN of fewer than divide over the mesh.
    """

    indices: Int[np.ndarray, " N"]
    images: Float[np.ndarray, "N E"]
    texts: Float[np.ndarray, "M E"]
    pool: Pool
    labels: Int[np.ndarray, " N"]
    classes: Float[np.ndarray, "C E"] | None
    loss: float

    @property
    def labelled(self) -> Int[np.ndarray, " L"]:
        """The places of the images that have a class."""
        return np.flatnonzero(self.labels >= 0)

    def classification(self, among: Sequence[int] | None = None) -> Classification:
        """What the images with a class are taken for, among all classes or some, then numbered anew.

        Images of a class that is not among them are left out.
        """
        assert self.classes is not None
        chosen = np.arange(len(self.classes)) if among is None else np.asarray(among)
        number = np.full(len(self.classes), -1)
        number[chosen] = np.arange(len(chosen))
        places = self.labelled
        places = places[number[self.labels[places]] >= 0]
        return classify(self.images[places], self.classes[chosen], number[self.labels[places]])

    def figures(self) -> dict[str, float]:
        """Loss, recalls both ways and, where there are classes, zero-shot accuracy among all of them."""
        figures = {"heldout_loss": self.loss} | recalls(ranks(self.images, self.texts, self.pool))
        if self.classes is not None and len(self.labelled):
            result = self.classification()
            figures |= {"zero_shot_accuracy": result.accuracy, "zero_shot_top5": result.top(5)}
        return figures


Measure = Callable[[Params, int | None], Measured]


def make_measure(
    blueprint: Blueprint,
    config: CLIPConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    split: Split,
    mesh: Mesh,
) -> Measure:
    """`measure(params, limit)`, compiled once: a split, or `limit` of its examples, always the same ones.

    To be called under `jax.set_mesh(mesh)`, as training is; with several processes each calls it, and each
    gets the same. `measure(params, limit).figures()` is what training writes.
    """
    embed = make_embed(blueprint, config, data, tokenizer, mesh)
    loss = _make_loss(blueprint, data.batch_size, mesh)
    classes = split.classes

    def measure(params: Params, limit: int | None = None) -> Measured:
        # Drawn, since a split may be in an order: by class, or by turns.
        order = np.random.default_rng(0).permutation(len(split))[:limit]
        images = embed.images(params, split, order.tolist())
        captions = pool([split.captions(i) for i in order.tolist()])
        texts = embed.texts(params, captions.captions)
        labels = [split.label(i) for i in order.tolist()]
        _, firsts = np.unique(captions.images, return_index=True)
        return Measured(
            order,
            images,
            texts,
            captions,
            np.array([-1 if label is None else label for label in labels]),
            None if classes is None else of_classes(lambda prompts: embed.texts(params, prompts), classes),
            loss(params, images, texts[captions.texts[firsts]]),
        )

    return measure


def of_classes(
    embed: Callable[[Sequence[str]], Float[np.ndarray, "T E"]], classes: Classes
) -> Float[np.ndarray, "C E"]:
    """An embedding a class: that of its name in each template, averaged."""
    return class_embeddings(
        embed, [[template.replace("{}", name) for template in classes.templates] for name in classes.names]
    )


def _make_loss(blueprint: Blueprint, batch_size: int, mesh: Mesh):
    """(params, images [N, E], texts [N, E]) -> the mean loss of the whole batches among them."""
    parts = mesh_parts(mesh, "act_batch")

    def of_batch(params, images, texts):
        scale, bias = jnp.exp(params["logit_scale"]), params.get("logit_bias")
        if bias is None:
            return softmax_loss(images, texts, scale, negatives="chunked").loss
        return sigmoid_loss(images, texts, scale, bias, negatives="chunked").loss

    where, rows, everywhere = (shardings(mesh, axes) for axes in (blueprint.axes, ("act_batch",), ()))
    program = jax.jit(of_batch, in_shardings=(where, rows, rows), out_shardings=everywhere)

    def loss(params: Params, images: Float[np.ndarray, "N E"], texts: Float[np.ndarray, "N E"]) -> float:
        size = min(batch_size, len(images)) // parts * parts
        starts = range(0, len(images) - size + 1, size) if size else ()
        return float(
            np.mean(
                [program(params, *_put(images, texts, start, size, mesh)) for start in starts] or [np.nan]
            )
        )

    return loss


def _put(images, texts, start: int, size: int, mesh: Mesh):
    return [put_rows(x[start : start + size][local_rows(mesh, size)], mesh) for x in (images, texts)]
