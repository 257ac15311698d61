"""The README of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip.config import Experiment as DualExperiment
from core.config import to_yaml
from export.families.dual import DualFamily
from export.families.family import Family
from llm.config import Experiment

_CARD = """\
---
library_name: transformers
pipeline_tag: {task}
---

# {name}

A {architecture}, {origin}. Its weights are in {dtype}.

```python
{example}
```

## Figures

{figures}

## Configuration

```yaml
{config}```
"""


_GENERATION = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")"""
_ZERO_SHOT = """\
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

images = AutoImageProcessor.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModel.from_pretrained("{folder}")
tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
pixels = images(pictures, return_tensors="pt")
scores = model(pixel_values=pixels.pixel_values, input_ids=tokens.input_ids).logits_per_image"""


def model_card(
    folder: Path,
    family: Family | DualFamily,
    experiment: Experiment | DualExperiment,
    step: int,
    figures: Mapping[str, Any],
    dtype: str,
) -> str:
    """Markdown, with what the run was trained with and what it reached."""
    rows = [f"| {key} | {value} |" for key, value in figures.items()]
    table = "\n".join(["| | |", "| --- | --- |", *rows]) if rows else "The run has no summary yet."
    dual = isinstance(family, DualFamily)
    return _CARD.format(
        task="zero-shot-image-classification" if dual else "text-generation",
        example=(_ZERO_SHOT if dual else _GENERATION).format(folder=folder),
        name=folder.name,
        architecture=family.architecture,
        origin=f"trained with token-to-tensor: the run `{experiment.run.name}` at step {step:,}"
        if step
        else f"from the run `{experiment.run.name}` of token-to-tensor, which has not trained it",
        dtype=dtype,
        figures=table,
        config=to_yaml(experiment),
    )
