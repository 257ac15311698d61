"""The model that is served, from a run's folder or a Hugging Face one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.config import load
from core.errors import UserError
from core.kinds import LANGUAGE_MODEL
from core.module import Params
from core.run import RunFolder
from llm.config import Experiment
from llm.model.config import ModelConfig
from llm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A model by the name that clients call it by."""

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    dtype: str = "float32"  # of the products

    @classmethod
    def of_run(cls, folder: Path, name: str | None = None) -> Served:
        """The newest intact checkpoint of a run, called after its folder unless a name is given.

        Raises:
            UserError: if the folder is no run, or has no checkpoint.
        """
        from core.checkpoint import newest_params
        from llm.model.transformer import blueprint

        run = RunFolder.open(folder, LANGUAGE_MODEL)
        experiment = load(Experiment, run.config)
        tokenizer = Tokenizer.load(run.tokenizer)
        params = newest_params(run, blueprint(experiment.model).shapes)
        return cls(name or folder.resolve().name, experiment.model, params, tokenizer, experiment.train.dtype)

    @classmethod
    def of(cls, folder: Path, name: str | None = None) -> Served:
        """A run's model or, where there is a `config.json`, an exported one.

        Raises:
            UserError: if the folder is neither, or what it holds is not supported.
        """
        if not (folder / "config.json").exists():
            return cls.of_run(folder, name)
        from export.read import read_config, read_params
        from llm.model.transformer import blueprint

        config = read_config(folder)
        if not isinstance(config, ModelConfig):
            raise UserError(
                f"{folder} compares images with captions and writes no text: name a language model"
            )
        params = read_params(folder, blueprint(config).shapes)
        return cls(name or folder.resolve().name, config, params, Tokenizer.load(folder))
