"""Continuous batching: requests join and leave a batch that decodes all the time, without waiting for others.

One compiled step draws the next tokens of every row of a `Ring`. Between steps a thread admits requests:
a prompt is read alone, in pieces of at most PIECE tokens between which the others go on, and its keys and
values are put into a free row. A row is free again as soon as its request has ended or was cancelled. The
ring grows by doubling, in rows and in slots, up to `max_rows` and the model's context, and shrinks when that
has been too much for a while; so it takes

    2 x layers x rows x slots x key-value heads x head dimension x bytes of a number

with rows and slots the next powers of two of what is in use.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from core.errors import UserError
from core.module import Params
from llm.batching import STEPS, TOP, Drawn, Programs, Rows, compile_batching
from llm.decode import cache_slots, left_pad, power_of_two
from llm.model.cache import empty_cache, empty_ring
from llm.model.config import ModelConfig
from llm.sampling import RowSampling, Sampling

PIECE = 256  # tokens of a prompt that are read before the running rows go on
_LOOK_SECONDS = 0.03  # between two looks, if that is more than one step
_PATIENCE = 64  # looks during which the ring is larger than needed before it shrinks

GREEDY = Sampling()

_log = logging.getLogger(__name__)


class Busy(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Request:
    """What to continue, and how. `repeat` tells equal prompts with one seed apart, as `prompt_keys` does."""

    prompt: list[int]
    max_new_tokens: int  # 0: only the prompt's log-probabilities
    sampling: Sampling = GREEDY
    seed: int | None = None  # None: another one each time
    repeat: int = 0
    stop_ids: frozenset[int] = frozenset()
    top: int = 0  # likeliest tokens to report with each token
    score_prompt: bool = False


class Token(NamedTuple):
    """A token, its log-probability in nats under the model's own distribution, and the likeliest instead."""

    id: int
    log_probability: float
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """What a request is told: new tokens, at first its prompt's too if asked for, at last why it ended.

    `prompt` leaves out the first token, which nothing predicts. `finish` is None while there is more to come,
    "stop" after one of the stop tokens, "length" at `max_new_tokens`, "cancelled", or "error".
    """

    tokens: list[Token]
    finish: str | None = None
    prompt: list[Token] | None = None


class Status(NamedTuple):
    running: int
    waiting: int
    rows: int
    slots: int
    tokens: int  # drawn since the start


@dataclass(eq=False)
class Ticket:
    """A request in the engine. `cancel` frees its row before the next step, from any thread."""

    request: Request
    deliver: Callable[[Piece], None]
    cancelled: bool = False
    drawn: int = 0
    last: int = 0
    key: np.ndarray | None = None
    wake: Callable[[], None] = field(default=lambda: None, repr=False)

    def cancel(self) -> None:
        self.cancelled = True
        self.wake()

    @property
    def position(self) -> int:
        """Of the token drawn last, which is not in the ring yet."""
        return len(self.request.prompt) + self.drawn - 1


class Engine:
    """Serves requests with one model, in a thread of its own from `start` to `close`."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        dtype: str = "float32",
        max_rows: int = 32,
        max_waiting: int = 256,
    ):
        """Of a model's parameters, as training has them."""
        self.config, self.max_rows, self.max_waiting = config, max_rows, max_waiting
        self._dtype = dtype
        self._programs = compile_batching(config, dtype)
        self._params = self._programs.prepare(params)
        self._ring = empty_ring(config, 1, self._slots_for(1), dtype)
        self._active: list[Ticket | None] = [None]
        self._waiting: deque[Ticket] = deque()
        self._reading: tuple[Ticket, Generator[int, None, int]] | None = None
        self._changed = threading.Condition()
        self._closing, self._roomy, self._tokens, self._step_seconds = False, 0, 0, _LOOK_SECONDS
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End all requests as cancelled, and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> Ticket:
        """Have a request answered by calls of `deliver`, in the engine's thread: it must return at once.

        Raises:
            UserError: if it doesn't fit the model.
            Busy: if as many wait as may.
        """
        _check(self.config, request)
        ticket = Ticket(request, deliver, wake=self._wake)
        with self._changed:
            if self._closing or len(self._waiting) >= self.max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def status(self) -> Status:
        running = self._used + (self._reading is not None)
        return Status(running, len(self._waiting), len(self._active), self._ring.slots, self._tokens)

    def warm_up(self) -> None:
        """Compile what prompts of up to PIECE tokens and a ring of up to `max_rows` need, before `start`.

        A prompt or a ring longer than that compiles its programs when it first comes.
        """
        rows, lengths = 1, [n for n in (16, 32, 64, 128, 256) if n + 2 <= self.config.max_length] or [1]
        for count in [1, *lengths]:
            self._run([Request([0] * count, 2)])
        while rows < self.max_rows:
            rows = min(2 * rows, self.max_rows)
            self._run([Request([0], 2)] * rows)
        self._run([Request([0], 1)])
        self._tokens = 0

    def _run(self, requests: list[Request]) -> None:
        self._waiting.extend(Ticket(request, lambda piece: None) for request in requests)
        while self._busy():
            self._turn()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _busy(self) -> bool:
        return bool(self._waiting or self._reading or any(self._active))

    def _serve(self) -> None:
        end = "error"
        try:
            while self._wait():
                try:
                    self._turn()
                except Exception:
                    _log.exception("a step failed: the requests in it end, the engine goes on")
                    self._fail()
            end = "cancelled"
        finally:
            with self._changed:
                self._closing = True
            for ticket in self._waiting:
                _tell(ticket, Piece([], end))
            self._waiting.clear()
            self._fail(end)

    def _wait(self) -> bool:
        """Until there is something to do; False if that is to close."""
        with self._changed:
            while not (self._closing or self._busy()):
                self._changed.wait()
            return not self._closing

    def _turn(self) -> None:
        """Read some of the prompts that wait, then draw some tokens of each row."""
        self._drop_cancelled()
        budget = PIECE
        while budget > 0 and (self._reading or self._begin_reading()):
            budget -= self._read_on()
        if any(self._active):
            self._decode()

    def _drop_cancelled(self) -> None:
        for row, ticket in enumerate(self._active):
            if ticket is not None and ticket.cancelled:
                self._end(row, Piece([], "cancelled"))
        if self._reading and self._reading[0].cancelled:
            ticket, self._reading = self._reading[0], None
            _tell(ticket, Piece([], "cancelled"))
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            _tell(ticket, Piece([], "cancelled"))

    def _end(self, row: int, piece: Piece) -> None:
        ticket, self._active[row] = self._active[row], None
        assert ticket is not None
        _tell(ticket, piece)

    def _fail(self, finish: str = "error") -> None:
        """End all rows, whose keys and values are lost with the ring that the step was given."""
        if self._reading:
            _tell(self._reading[0], Piece([], finish))
            self._reading = None
        for row, ticket in enumerate(self._active):
            if ticket is not None:
                self._end(row, Piece([], finish))
        self._ring = empty_ring(self.config, 1, self._slots_for(1), self._dtype)
        self._active, self._roomy = [None], 0

    def _begin_reading(self) -> bool:
        if not self._can_begin():
            return False
        with self._changed:
            ticket = self._waiting.popleft()
        self._reading = ticket, self._read(ticket)
        return True

    def _can_begin(self) -> bool:
        return bool(self._waiting) and self._used < self.max_rows

    @property
    def _used(self) -> int:
        return sum(ticket is not None for ticket in self._active)

    def _read_on(self) -> int:
        """Read the next piece of a prompt; the number of tokens it has, with padding."""
        assert self._reading is not None
        ticket, pieces = self._reading
        try:
            return next(pieces)
        except StopIteration as last:
            self._reading = None
            return last.value
        except Exception:
            if self._ring.column.is_deleted():
                raise  # with it the ring is lost
            _log.exception("reading a prompt of %d tokens failed", len(ticket.request.prompt))
            self._reading = None
            _tell(ticket, Piece([], "error"))
        return 0

    def _read(self, ticket: Ticket) -> Generator[int, None, int]:
        """Read a prompt in pieces, draw its first token, and give it a row if it has to go on.

        Yields the tokens of a piece, with padding, and returns those of the last.
        """
        request = ticket.request
        length = len(request.prompt)
        ticket.key = _key(self._programs, request)
        padded = power_of_two(max(length, 16)) if length <= PIECE else -(-length // PIECE) * PIECE
        (tokens,), (segments,) = left_pad([request.prompt], padded)
        positions = np.maximum(np.cumsum(segments) - 1, 0).astype(np.int32)
        targets = np.append(tokens[1:], 0).astype(np.int32)
        cache = empty_cache(self.config, 1, power_of_two(padded), self._dtype)
        rows, scores = _rows([ticket]), []
        for start in range(0, padded, PIECE):
            if start:
                yield PIECE
            piece = slice(start, start + PIECE)
            cache, drawn, score = self._programs.prefill(
                self._params, cache, tokens[None, piece], segments[None, piece], positions[None, piece],
                targets[piece], rows, request.top > 0, score=request.score_prompt,
            )  # fmt: skip
            scores.append(score)
        prompt = None
        if request.score_prompt:
            fetched = jax.tree.map(lambda *a: np.concatenate(a), *jax.device_get(scores))
            prompt = _tokens(fetched, request.top)[padded - length : -1]
        if request.max_new_tokens == 0:
            _tell(ticket, Piece([], "length", prompt))
            return min(padded, PIECE)
        (first,) = _tokens(jax.device_get(drawn), request.top)
        answer = self._advance(ticket, [first])._replace(prompt=prompt)
        _tell(ticket, answer)
        if answer.finish is None:
            row = self._free_row(ticket.position + 1)
            k_v = self._programs.align(cache, self._ring.column, self._ring.slots)
            self._ring = self._programs.put(self._ring, np.int32(row), *k_v)
            self._active[row] = ticket
        return min(padded, PIECE)

    def _advance(self, ticket: Ticket, tokens: list[Token]) -> Piece:
        """Take tokens up to the request's end."""
        request = ticket.request
        for count, token in enumerate(tokens, 1):
            ticket.drawn, ticket.last, self._tokens = ticket.drawn + 1, token.id, self._tokens + 1
            if token.id in request.stop_ids:
                return Piece(tokens[:count], "stop")
            if ticket.drawn == request.max_new_tokens:
                return Piece(tokens[:count], "length")
        return Piece(tokens)

    def _decode(self) -> None:
        tickets = [ticket for ticket in self._active if ticket is not None]
        left = min(ticket.request.max_new_tokens - ticket.drawn for ticket in tickets)
        # One step while others wait to be read; else as many as keep the host's share of the time small.
        count = 1 if self._reading or self._can_begin() else int(_LOOK_SECONDS / self._step_seconds)
        count = max(1, min(count, STEPS, left))
        self._fit(max(ticket.position for ticket in tickets) + count)
        wants_top = any(ticket.request.top for ticket in tickets)
        rows, started = _rows(self._active), time.perf_counter()
        self._ring, drawn = self._programs.step(
            self._params, self._ring, rows, np.int32(count), np.bool_(wants_top)
        )
        drawn = jax.device_get(drawn)
        self._step_seconds = (time.perf_counter() - started) / count
        for row, ticket in enumerate(self._active):
            if ticket is not None:
                own = jax.tree.map(lambda a, row=row: a[:count, row], drawn)
                piece = self._advance(ticket, _tokens(own, ticket.request.top))
                if piece.finish is None:
                    _tell(ticket, piece)
                else:
                    self._end(row, piece)

    def _slots_for(self, length: int) -> int:
        return cache_slots(max(length, 128), self.config.max_length)

    def _rows_for(self, count: int) -> int:
        return min(power_of_two(count), self.max_rows)

    def _free_row(self, length: int) -> int:
        """A row for one request more, of so many tokens now."""
        used = self._used
        if used == 0:  # nothing to keep: the ring may be of any size at once
            rows, slots = self._rows_for(1 + len(self._waiting)), self._slots_for(length)
            if (rows, slots) != (len(self._active), self._ring.slots):
                self._ring = empty_ring(self.config, rows, slots, self._dtype)
                self._active, self._roomy = [None] * rows, 0
            return 0
        rows, slots = len(self._active), max(self._ring.slots, self._slots_for(length))
        if used == rows:
            rows = self._rows_for(used + 1 + len(self._waiting))
        self._resize(rows, slots)
        return self._active.index(None)

    def _fit(self, length: int) -> None:
        """Grow the ring to `length` slots; shrink it if it has been too large for long."""
        rows, slots = self._rows_for(self._used), self._slots_for(length)
        self._roomy = self._roomy + 1 if (rows < len(self._active) or slots < self._ring.slots) else 0
        if slots > self._ring.slots:
            self._resize(len(self._active), slots)
        elif self._roomy >= _PATIENCE:
            self._resize(rows, slots)

    def _resize(self, rows: int, slots: int) -> None:
        if (rows, slots) == (len(self._active), self._ring.slots):
            return
        used = [row for row, ticket in enumerate(self._active) if ticket is not None]
        if rows >= len(self._active):
            used = [*range(len(self._active))]
        source = np.asarray(used + [0] * (rows - len(used)), np.int32)
        self._ring = self._programs.resize(self._ring, source, slots)
        kept = [self._active[row] for row in used]
        self._active, self._roomy = kept + [None] * (rows - len(used)), 0


def _check(config: ModelConfig, request: Request) -> None:
    if not request.prompt:
        raise UserError("the prompt is empty: it must have at least one token to go on from")
    if not all(0 <= i < config.vocab_size for i in request.prompt):
        raise UserError(f"the prompt has token ids outside the vocabulary, 0 to {config.vocab_size - 1}")
    if request.max_new_tokens < 0 or not 0 <= request.top <= TOP:
        raise UserError(f"new tokens must be at least 0, and reported likeliest ones 0 to {TOP}")
    total = len(request.prompt) + request.max_new_tokens
    if total > config.max_length:
        raise UserError(
            f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones are {total}, "
            f"more than the model's context of {config.max_length}: shorten the prompt or ask for fewer"
        )


def _key(programs: Programs, request: Request) -> np.ndarray:
    """The key's data: as `sampling.prompt_keys` makes it of a seed."""
    seed = int.from_bytes(os.urandom(4), "little") if request.seed is None else request.seed
    number = zlib.crc32(np.asarray(request.prompt, np.int64).tobytes())
    return np.asarray(programs.key(*(np.uint32(n) for n in (seed, number, request.repeat))))


def _rows(tickets: Sequence[Ticket | None]) -> Rows:
    count = len(tickets)
    ints = lambda: np.zeros(count, np.int32)  # noqa: E731
    sampling = RowSampling(np.zeros(count, np.float32), ints(), np.ones(count, np.float32))
    rows = Rows(ints(), ints(), np.zeros(count, bool), ints(), np.zeros((count, 2), np.uint32), sampling)
    for i, ticket in enumerate(tickets):
        if ticket is None:
            continue
        rows.tokens[i], rows.drawn[i], rows.active[i] = ticket.last, ticket.drawn, True
        rows.positions[i], rows.keys[i] = ticket.position, ticket.key
        asked = ticket.request.sampling
        sampling.temperature[i] = asked.temperature or 0
        sampling.top_k[i] = asked.top_k or 0
        sampling.top_p[i] = 1 if asked.top_p is None else asked.top_p
    return rows


def _tokens(drawn: Drawn, top: int) -> list[Token]:
    """Of arrays [N], with the `top` likeliest."""
    lists = [drawn.ids.tolist(), drawn.log_probabilities.tolist()]
    tops: list[list[tuple[int, float]]] = [[] for _ in lists[0]]
    if top:
        pairs = drawn.top_ids[:, :top].tolist(), drawn.top_log_probabilities[:, :top].tolist()
        tops = [list(zip(*pair, strict=True)) for pair in zip(*pairs, strict=True)]
    return [Token(*token) for token in zip(*lists, tops, strict=True)]


def _tell(ticket: Ticket, piece: Piece) -> None:
    try:
        ticket.deliver(piece)
    except Exception:  # such as an event loop that has closed meanwhile
        _log.debug("nobody took a piece", exc_info=True)
        ticket.cancelled = True
