"""A mistake of the user's is told in one message with its remedy, never as a traceback."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend. The message names the thing and says what to do about it."""


def run_command(main: Callable[[list[str]], None], again: str = "run the same command again") -> None:
    """Run a command line with `sys.argv[1:]` and exit: 0 done, 2 the user's mistake, 130 interrupted.

    A full disk is the one operating-system error that no check can foresee, so it is named here; `again` is
    what to do when there is space.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        end(2, str(error))
    except BrokenPipeError:
        # The reader went away (`| head`): that is its right, and Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        end(2, f"the disk is full{where}: free some space and {again}")
    except KeyboardInterrupt:
        end(130, "")


def require(extra: str, *packages: str) -> None:
    """Before anything is loaded or computed for nothing.

    Raises:
        UserError: if a package that the extra brings is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"this needs the package '{package}': pip install -e '.[{extra}]'")


def tell(message: str) -> None:
    """Print an error message, after what the program printed before."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)


def _end_alone(code: int, message: str) -> NoReturn:
    if message:
        tell(message)
    sys.exit(code)


# How a command ends; `core.distributed` puts here what ends a job of several processes.
end: Callable[[int, str], NoReturn] = _end_alone
