"""The README of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.config import to_yaml
from export.families.family import Family
from llm.config import Experiment

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {architecture}, trained with token-to-tensor: the run `{run}` at step {step:,}.
Its weights are in {dtype}{rounded}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```

## Figures

{figures}

## Configuration

```yaml
{config}```
"""


def model_card(
    name: str, family: Family, experiment: Experiment, step: int, figures: Mapping[str, Any], dtype: str
) -> str:
    """Markdown, with what the run was trained with and what it reached."""
    rows = [f"| {key} | {value} |" for key, value in figures.items()]
    table = "\n".join(["| | |", "| --- | --- |", *rows]) if rows else "The run has no summary yet."
    return _CARD.format(
        name=name,
        architecture=family.architecture,
        run=experiment.run.name,
        step=step,
        dtype=dtype,
        rounded="" if dtype == "float32" else " (rounded from the float32 that it was trained in)",
        figures=table,
        config=to_yaml(experiment),
    )
