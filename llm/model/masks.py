"""Which keys a query may see: the one description that every attention backend, captured maps, decoding and
the count of operations go by. Describing a mask needs no JAX.

A query sees a key that is not later and, where documents are kept apart, belongs to its document. Of these a
`window` leaves the last ones: fewer than `window` indices back. Block sparsity leaves the `local_blocks` last
blocks, the query's own included, and the `global_blocks` first ones: the sliding and the global part of
Longformer (Beltagy et al. 2020, arXiv:2004.05150) and BigBird (Zaheer et al. 2020, arXiv:2007.14062), causal
and without the latter's random part.

Under a mask that is not `causal`, an image's say, a query sees every key of its row.

Blocks are counted from the first token of the document, not of the row. A packed document begins anywhere in
a row, and a prompt in the cache behind some padding: what a token sees must not depend on where. (The first
block of the row would be another document's, hidden anyway.) A document is a run of equal segment ids; where
documents are not kept apart, the row is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Int

from llm.model.config import BlockShape, Sparsity

if TYPE_CHECKING:
    Array = Any  # NumPy's or JAX's


class Mask(NamedTuple):
    """A causal mask, with a window or block sparsity if given; or one that hides nothing."""

    window: int | None = None
    sparsity: Sparsity | None = None
    causal: bool = True  # if not, there is neither window nor sparsity

    @classmethod
    def of(cls, config: BlockShape) -> Mask:
        return cls(config.window, config.sparsity, config.causal)

    def visible(self, i: Any, j: Any, start: Any = None) -> Any:
        """Whether the query at index i sees the key at index j, its document beginning at index `start`.

        Arguments are integers or arrays that broadcast; no `start` means that the row is one document.

        Raises:
            ValueError: for a part of a row, of a mask that is not causal: that is for causal ones alone.
        """
        seen = j <= i
        if not self.causal:
            if start is not None or self.window is not None or self.sparsity is not None:
                raise ValueError("documents, windows and block sparsity are for causal attention")
            return seen | True
        if start is not None:
            seen = seen & (j >= start)
        if self.window is not None:
            seen = seen & (i - j < self.window)
        if self.sparsity is not None:
            begin = 0 if start is None else start
            q_block, k_block = ((at - begin) // self.sparsity.block_size for at in (i, j))
            near = q_block - k_block < self.sparsity.local_blocks
            seen = seen & (near | (k_block < self.sparsity.global_blocks))
        return seen

    def first_near(self, i: int, aligned: bool) -> int:
        """The first key that the query at index i can see, but for `global_keys`.

        `aligned` where its document is known to begin with the row, and so do its blocks.
        """
        if self.window is not None:
            return max(0, i - self.window + 1)
        if self.sparsity is None:
            return 0
        size, count = self.sparsity.block_size, self.sparsity.local_blocks
        return max(0, (i // size - count + 1) * size if aligned else i - count * size + 1)

    @property
    def global_keys(self) -> int:
        """How many keys at a document's beginning all its queries see."""
        return 0 if self.sparsity is None else self.sparsity.global_blocks * self.sparsity.block_size

    def mean_visible(self, length: int) -> float:
        """Mean number of keys that a query of a document of `length` tokens sees, as an area.

        The query's own key counts half: without window or sparsity that is length / 2, the triangle.
        """
        if not self.causal:
            return length
        if self.sparsity is None:
            window = min(self.window or length, length)
            return window - window**2 / (2 * length)
        size, area = self.sparsity.block_size, 0.0
        for first in range(0, length, size):
            queries, near = min(size, length - first), self.first_near(first, aligned=True)
            area += queries * (queries / 2 + first - near + min(self.global_keys, near))
        return area / length


CAUSAL = Mask()


def document_starts(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The index of the first token of each token's document."""
    import jax
    import jax.numpy as jnp

    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(begins, jnp.arange(segments.shape[1]), 0), axis=1)
