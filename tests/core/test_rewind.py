"""Which batches a rewound run takes, and where it goes back to."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.divergence import Alarm
from core.errors import UserError
from core.options import DivergenceConfig
from core.rewind import Rewind, append_rewind, batch_of, merged, plan, read_rewinds

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 15)).map(lambda s: (s[0], s[0] + s[1])))
OPTIONS = DivergenceConfig(skip=4, rewinds=3)


@given(SPANS)
def test_batches_are_taken_in_order_but_for_the_skipped(spans):
    skipped = {batch for start, stop in spans for batch in range(start, stop)}
    expected = [batch for batch in range(200) if batch not in skipped][:50]
    assert [batch_of(step, spans) for step in range(50)] == expected


@given(SPANS)
def test_merged_spans_are_the_same_batches_apart_and_in_order(spans):
    apart = merged(spans)
    assert sorted({b for s in spans for b in range(*s)}) == [b for s in apart for b in range(*s)]
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(apart))


def alarm(step: int, good: int) -> Alarm:
    return Alarm(step, good, "loss", 9.0, "loss is 9")


def rewound(*spans: tuple[int, int]) -> list[Rewind]:
    return [Rewind(0, "loss", 9.0, "loss is 9", 0, span, []) for span in spans]


@pytest.mark.parametrize(
    ("checkpoints", "restored", "skipped"),
    [
        ([10, 20, 30, 40], 20, (25, 36)),  # 30 is after the first batch to skip, 40 after the divergence
        ([26, 28, 30], 26, (26, 36)),  # none early enough: the oldest, and what is skipped begins there
        ([30, 40], 0, (25, 36)),  # none of which nothing bad is known
        ([], 0, (25, 36)),
        ([0, 26, 28, 30], 26, (26, 36)),  # an imported run goes back no further than another
        ([0, 30, 40], 0, (25, 36)),
    ],
)
def test_the_checkpoint_before_the_bad_batches(checkpoints, restored, skipped):
    """Steps 30 to 32, which take batches 29 to 31, were bad."""
    found = plan(alarm(32, 29), [], checkpoints, OPTIONS)
    assert (found.restored, found.skipped) == (restored, skipped)


def test_a_rewind_near_an_earlier_one_skips_twice_as_much():
    before = rewound((25, 36))
    # After going back to step 20: steps 25 on take batches 36 on. Steps 26 to 28 are bad: 36 to 38.
    assert plan(alarm(28, 25), before, [20], OPTIONS).skipped == (28, 47)
    assert plan(alarm(28, 25), rewound((25, 36), (28, 36)), [10, 20], OPTIONS).skipped == (20, 55)
    far = plan(alarm(128, 125), before, [20, 110], OPTIONS)
    assert (far.restored, far.skipped) == (110, (132, 143))


def test_after_the_last_rewind_the_run_stops():
    with pytest.raises(
        UserError, match=r"at step 32, loss is 9; it has been rewound 3 time\(s\).*learning_rate"
    ):
        plan(alarm(32, 29), rewound((1, 2), (5, 6), (9, 10)), [], OPTIONS)
    with pytest.raises(UserError, match="it may not be rewound"):
        plan(alarm(32, 29), [], [], DivergenceConfig(rewinds=0))


def test_the_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "rewinds.jsonl"
    assert read_rewinds(path) == []
    rewinds = [*rewound((1, 4)), Rewind(7, "loss", None, "loss is nan", 4, (5, 9), [2.5, None])]
    for rewind in rewinds:
        append_rewind(path, rewind)
    assert read_rewinds(path) == rewinds
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match=r"rewinds\.jsonl is damaged"):
        read_rewinds(path)
