"""Joining a job: what can't work is told. Jobs of real processes: tests/llm/test_processes.py."""

from __future__ import annotations

import jax
import pytest

from core import distributed
from core.distributed import AnyProcess, Place, first_before_others, is_first, on_first
from core.errors import UserError


def test_a_first_process_that_never_comes_is_told(monkeypatch):
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"no process 0 at 127\.0\.0\.1:1 .*\(Connection refused\)"):
        distributed._connect(Place("127.0.0.1:1", 2, 1))


def test_alone_everything_is_done_here():
    distributed.join({})
    assert is_first() and on_first(lambda: 3) == 3 and first_before_others(lambda: "x") == "x"
    flag = [False]
    asked = AnyProcess(lambda: flag[0], jax.make_mesh((8,), ("data",)))
    asked.ask()
    assert not asked.answer()
    flag[0] = True
    assert asked.answer()  # at once, not a step later


@pytest.mark.parametrize(
    ("error", "is_of_peer"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), True),
        (RuntimeError("the task was preempted: heartbeat timeout"), True),
        (ValueError("step 3 after step 4"), False),
        (KeyError("Gloo"), False),
    ],
)
def test_the_death_of_a_peer_is_told_from_a_mistake(error, is_of_peer):
    assert distributed._is_of_peer(error) == is_of_peer
