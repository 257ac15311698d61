"""What a configuration says of one source of documents. Reading it needs no JAX."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_serializer, model_validator

from core.config import config

_OPTIONS = {
    "path": ("field",),
    "huggingface": ("name", "revision", "split", "field"),
    "tfds": ("dir", "split", "field"),
}


@config
class Source:
    """One entry of `data.sources` or `data.heldout`: a string, short for `path`, or a mapping of one kind.

    - `{path: GLOB}`: files, read by their suffix: JSON lines (`.jsonl`, `.ndjson`; compressed too: `.gz`,
      `.bz2`, `.xz`, `.zst`), `.parquet`, and anything else as UTF-8 text, a file a document. A `.json` file
      holds JSON lines if it is compressed or a `field` is named. `embedded` is the text of Python itself.
    - `{huggingface: NAME_OR_FOLDER}`: a data set of the Hugging Face hub, or a folder laid out like one.
    - `{tfds: NAME}`: a data set that `tensorflow_datasets` has prepared as ArrayRecord.
    """

    path: str | None = None
    huggingface: str | None = None
    tfds: str | None = None
    field: str | None = None  # of a record: where its text stands; None: `text`
    split: str | None = None  # of the data set; None: `train`
    name: str | None = None  # Hugging Face: which of its configurations
    revision: str | None = None  # Hugging Face: a branch, tag or commit; None: the newest
    dir: str | None = None  # TFDS: where data sets are prepared; None: ~/tensorflow_datasets
    weight: float | None = Field(None, gt=0, le=1)  # the share of training tokens; all sources or none

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self):
        kinds = [kind for kind in _OPTIONS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = f"has {' and '.join(kinds)}" if kinds else "says not where documents are"
            raise ValueError(f"it {found}: name one of {', '.join(_OPTIONS)}")
        options = {name for names in _OPTIONS.values() for name in names}
        for option in sorted(options.difference(_OPTIONS[kinds[0]])):
            if getattr(self, option) is not None:
                raise ValueError(
                    f"'{option}' means nothing with '{kinds[0]}', which takes {', '.join(_OPTIONS[kinds[0]])}"
                )
        return self

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        written = {key: value for key, value in vars(self).items() if value is not None}
        return written["path"] if written.keys() == {"path"} else written

    @property
    def label(self) -> str:
        """How messages and selection files call it."""
        kind = "huggingface" if self.huggingface else "tfds"
        options = (self.huggingface or self.tfds, self.name, self.split)
        return self.path or f"{kind}:{' '.join(option for option in options if option)}"


def check_weights(sources: tuple[Source, ...]) -> None:
    """Raise a ValueError unless no source has a weight, or all have and they add up to 1."""
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return
    entries = ", ".join(f"{source.label!r} {source.weight or 'none'}" for source in sources)
    if len(weights) < len(sources):
        raise ValueError(f"all of data.sources have a weight or none has; here: {entries}")
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"the weights of data.sources add up to {sum(weights):.6g}, not 1: {entries}")
