"""The README of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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

A {architecture}, {origin}. Its weights are in {dtype}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
```

## Figures

{figures}

## Configuration

```yaml
{config}```
"""


def model_card(
    folder: Path, family: Family, experiment: Experiment, step: int, figures: Mapping[str, Any], dtype: str
) -> str:
    """Markdown, with what the run was trained with and what it reached."""
    rows = [f"| {key} | {value} |" for key, value in figures.items()]
    table = "\n".join(["| | |", "| --- | --- |", *rows]) if rows else "The run has no summary yet."
    return _CARD.format(
        name=folder.name,
        folder=folder,
        architecture=family.architecture,
        origin=f"trained with token-to-tensor: the run `{experiment.run.name}` at step {step:,}"
        if step
        else f"from the run `{experiment.run.name}` of token-to-tensor, which has not trained it",
        dtype=dtype,
        figures=table,
        config=to_yaml(experiment),
    )
