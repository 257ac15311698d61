"""SIGTERM and Ctrl-C ask a loop to stop at a place of its choosing, where it can save its work."""

from __future__ import annotations

import signal
import types


class Stop:
    """Turns SIGTERM and SIGINT into a flag that a loop polls:

        with Stop() as stop:
            while not stop.signal:
                ...

    `signal` is None, or the name of the first signal that came. A Ctrl-C after that raises
    `KeyboardInterrupt` at once, for the user who won't wait; a second SIGTERM changes nothing. The handlers
    found on entering are put back on leaving. To be entered on the main thread, like all signal handling.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    def __enter__(self) -> Stop:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number).name
