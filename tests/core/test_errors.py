"""Commands end in one message and the right exit code, never in a traceback of the user's own mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(body: str, **options) -> subprocess.CompletedProcess:
    script = (
        f"import errno, sys\nfrom core.errors import UserError, run_command\ndef main(argv):\n    {body}\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script + "run_command(main)", "x", "y"],
        cwd=ROOT, capture_output=True, text=True, **options,
    )  # fmt: skip


def test_a_command_that_works_gets_its_arguments_and_exits_with_0():
    done = run("print(argv)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "['x', 'y']\n", "")


def test_the_users_mistake_is_one_line_and_exit_code_2():
    done = run("print('before'); raise UserError('no file a.txt: name another')")
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "before\n",
        "error: no file a.txt: name another\n",
    )


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT"])
def test_a_full_disk_is_named(number):
    done = run(f"raise OSError(errno.{number}, 'x', '/runs/a/metrics.jsonl')")
    assert done.returncode == 2
    assert done.stderr == (
        "error: the disk is full while writing /runs/a/metrics.jsonl: "
        "free some space and run the same command again\n"
    )


def test_an_interrupt_exits_with_130_in_silence():
    done = run("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("error", ["ValueError('a bug')", "OSError(errno.EIO, 'a failing disk')"])
def test_a_mistake_of_ours_keeps_its_traceback(error):
    done = run(f"raise {error}")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_reader_that_goes_away_is_no_error():
    read_one_line = f'{sys.executable} -c "{{}}" | head -n 1'
    script = (
        "from core.errors import run_command; "
        "run_command(lambda argv: [print(i) for i in range(200000)] and None)"
    )
    done = subprocess.run(
        ["bash", "-c", read_one_line.format(script) + '; echo "${PIPESTATUS[0]}"'],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n141\n", "")
