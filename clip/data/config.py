"""What a configuration says of images and captions. Reading it needs no JAX."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_serializer, model_validator

from core.config import config

# Options of each kind of source.
_OPTIONS = {
    "embedded": (),
    "csv": ("images", "image", "caption"),
    "jsonl": ("images", "image", "caption"),
    "classes": ("templates",),
    "huggingface": ("name", "revision", "split", "image", "caption", "templates"),
    "tfds": ("dir", "split", "image", "caption", "templates"),
}
TEMPLATES = ("a photo of a {}",)


@config
class Source:
    """One entry of `data.sources` or `data.heldout`: the word `embedded`, or a mapping of one kind.

    - `embedded`: scenes of handwritten digits, made on the fly (`clip.data.scenes`).
    - `{csv: FILE, images: FOLDER}`: a table with a header, a row a caption; tabs where FILE ends in `.tsv`.
    - `{jsonl: FILE, images: FOLDER}`: a JSON object a line, with one caption or a list of them.
    - `{classes: FOLDER, templates: [...]}`: a folder of images for each class; captions are the templates.
    - `{huggingface: NAME_OR_FOLDER}`: a data set of the Hugging Face hub, or a folder laid out like one.
    - `{tfds: NAME}`: a data set that `tensorflow_datasets` has prepared as ArrayRecord.

    Where `caption` names class labels of one of the last two, captions are the templates, as of `classes`.

    A path may lead into a zip archive, as `photos.zip/images` does.
    """

    embedded: bool | None = None
    csv: str | None = None
    jsonl: str | None = None
    classes: str | None = None
    huggingface: str | None = None
    tfds: str | None = None
    images: str | None = None  # where the files are that a table names; None: beside it
    image: str | None = None  # of a record: where its image stands; None: `image`
    # Of a record: where its caption or captions stand, None: `caption`. `a/b` is field b of (each of) a.
    caption: str | None = None
    # What is said of a class, whose name is `{}`; None: `a photo of a {}`.
    templates: tuple[str, ...] | None = Field(None, min_length=1)
    split: str | None = None  # of the data set; None: `train`
    name: str | None = None  # Hugging Face: which of its configurations
    revision: str | None = None  # Hugging Face: a branch, tag or commit; None: the newest
    dir: str | None = None  # TFDS: where data sets are prepared; None: ~/tensorflow_datasets

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("templates"), list):
            # What is looked at here isn't JSON any more, of which pydantic would take a list.
            return value | {"templates": tuple(value["templates"])}
        if not isinstance(value, str):
            return value
        if value != "embedded":
            raise ValueError(f"{value!r} is no source: write embedded, or a mapping such as {{csv: {value}}}")
        return {"embedded": True}

    @model_validator(mode="after")
    def _check(self):
        kinds = [kind for kind in _OPTIONS if getattr(self, kind)]
        if len(kinds) != 1:
            found = f"has {' and '.join(kinds)}" if kinds else "says not where images are"
            raise ValueError(f"it {found}: name one of {', '.join(_OPTIONS)}")
        (kind,) = kinds
        for option in sorted({name for names in _OPTIONS.values() for name in names}):
            if getattr(self, option) is not None and option not in _OPTIONS[kind]:
                takes = ", ".join(_OPTIONS[kind]) or "nothing"
                raise ValueError(f"'{option}' means nothing with '{kind}', which takes {takes}")
        for template in self.templates or ():
            if "{}" not in template:
                raise ValueError(f"the template {template!r} has no place for the class: write {{}} there")
        return self

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        return "embedded" if self.embedded else {k: v for k, v in vars(self).items() if v is not None}

    @property
    def kind(self) -> str:
        return next(kind for kind in _OPTIONS if getattr(self, kind))

    @property
    def label(self) -> str:
        """How messages call it."""
        if self.embedded:
            return "embedded"
        hub = f"{self.kind}:" if self.kind in ("huggingface", "tfds") else ""
        options = (getattr(self, self.kind), self.name, self.split)
        return hub + " ".join(option for option in options if option)


@config
class DataConfig:
    """Which images and captions are read, and what is done to the images."""

    batch_size: int = Field(ge=1)  # pairs in a step, over all devices and microbatches
    sources: tuple[Source, ...] = Field((Source(embedded=True),), min_length=1)
    # Sources of their own; None: a share of `sources` by the content of the image. `embedded` has its own.
    heldout: tuple[Source, ...] | None = Field(None, min_length=1)
    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    # In training an image is cropped to a random rectangle of at least this share of its area (OpenCLIP's
    # default); 1: as in evaluation, to the square in its middle.
    crop_area: float | int = Field(0.9, gt=0, le=1)
    # Whether training mirrors half of all images: not where captions say left and right.
    flip: bool = False
    broken_fraction: float | int = Field(0.01, ge=0, lt=1)  # of the images that may be left out
    workers: int = Field(2, ge=1)  # threads that decode and augment
    cache: str | None = None  # tokenizers and what is known of images; None: `.cache` beside the runs

    @model_validator(mode="after")
    def _check(self):
        if any(source.embedded for source in self.sources) and (len(self.sources) > 1 or self.heldout):
            raise ValueError(
                "'embedded' brings its own held-out split: leave other sources and data.heldout out"
            )
        if any(source.embedded for source in self.heldout or ()):
            raise ValueError("data.heldout: 'embedded' goes with itself alone: name it in data.sources")
        return self
