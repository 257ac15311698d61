"""Going back after a divergence: to which checkpoint, and past which batches.

Step s trains on batch s, counted from 0, until batches are skipped: from there on it takes a later one. A
rewind goes back to a checkpoint before the first bad batch and passes over the bad ones and some around them
(Chowdhery et al. 2022, arXiv:2204.02311, section 5.1, did so by hand). `rewinds.jsonl` in the run's folder is
the record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.divergence import Alarm
from core.errors import UserError
from core.files import write_atomically
from core.options import DivergenceConfig
from core.run import plain

Span = tuple[int, int]  # batches [start, stop)


class Rewind(NamedTuple):
    """One line of `rewinds.jsonl`. `value` is null where it was not finite."""

    step: int  # at which the run was stopped
    metric: str
    value: float | None
    reason: str
    restored: int  # the step gone back to
    skipped: Span
    lost_loss: list[float | None]  # of the steps given up, `restored` + 1 to `step`


def batch_of(step: int, skipped: Iterable[Span]) -> int:
    """The batch that training step `step` (from 0) takes when those in `skipped` are passed over."""
    for start, stop in merged(skipped):
        if step >= start:
            step += stop - start
    return step


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same batches as spans that are apart and in order."""
    apart: list[Span] = []
    for start, stop in sorted(spans):
        if apart and start <= apart[-1][1]:
            apart[-1] = apart[-1][0], max(apart[-1][1], stop)
        else:
            apart.append((start, stop))
    return apart


def plan(
    alarm: Alarm, before: Sequence[Rewind], checkpoints: Iterable[int], options: DivergenceConfig
) -> Rewind:
    """Where to go back to after `alarm`, and which batches to pass over.

    Around the bad batches `options.skip` more are skipped, twice as many for each earlier rewind nearby: more
    must be bad than were passed over. The checkpoint is the newest from which all of these lie
    ahead; where none is kept from so far back, the oldest of which nothing bad is known; without one, the
    run's start, which of an imported run is a checkpoint too.

    Raises:
        UserError: when the run has been rewound as often as it may.
    """
    if len(before) >= options.rewinds:
        raise UserError(_give_up(alarm, before, options))
    skipped = merged(rewind.skipped for rewind in before)
    first, last = batch_of(alarm.good, skipped), batch_of(alarm.step - 1, skipped)
    around = options.skip
    for rewind in before:
        if rewind.skipped[0] - options.skip <= last and first - options.skip <= rewind.skipped[1]:
            around *= 2
    good = sorted(step for step in checkpoints if 0 < step <= alarm.good)
    early = [step for step in good if batch_of(step, skipped) <= first - around]
    restored = max(early) if early else min(good, default=0)
    span = max(first - around, batch_of(restored, skipped)), last + 1 + around
    return Rewind(alarm.step, alarm.metric, plain(alarm.value), alarm.reason, restored, span, [])


def _give_up(alarm: Alarm, before: Sequence[Rewind], options: DivergenceConfig) -> str:
    past = "; ".join(f"step {rewind.step}: {rewind.reason}" for rewind in before)
    tried = (
        f"it has been rewound {len(before)} time(s) before ({past})" if before else "it may not be rewound"
    )
    return (
        f"the run diverges: at step {alarm.step}, {alarm.reason}; {tried}, and divergence.rewinds is "
        f"{options.rewinds}. Its good checkpoints stand. If it goes wrong again and again, start another run "
        "with a lower optimizer.learning_rate or more optimizer.warmup_steps; if some batches are bad, raise "
        "divergence.rewinds, and maybe divergence.skip, and go on with --resume"
    )


def read_rewinds(path: Path) -> list[Rewind]:
    """The rewinds of a run so far, from its `rewinds.jsonl`.

    Raises:
        UserError: for a damaged file.
    """
    if not path.exists():
        return []
    try:
        return [rewind_of(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} is damaged: it says which batches the run passes over; bring it back from a copy"
        ) from None


def rewind_of(line: dict[str, Any]) -> Rewind:
    """The inverse of `_asdict`, by way of JSON."""
    return Rewind(**{**line, "skipped": tuple(line["skipped"])})


def append_rewind(path: Path, rewind: Rewind) -> None:
    """Add `rewind` to the record, in one step."""
    rewinds = [*read_rewinds(path), rewind]
    write_atomically(path, "".join(json.dumps(line._asdict()) + "\n" for line in rewinds))
