"""Continuous batching against `llm.decode.generate`: a request gets the tokens it would get alone."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tiny import random_params

from core.errors import UserError
from llm import decode, engine
from llm.engine import Busy, Engine, Piece, Request, Token
from llm.model.config import ModelConfig, MoEConfig, Sparsity
from llm.model.transformer import blueprint
from llm.sampling import Sampling, prompt_keys

VOCAB = 62
LLAMA = ModelConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=36,
    max_length=320,
)  # fmt: skip
GREEDY, SAMPLED = Sampling(), Sampling.of(1.5, top_k=40, top_p=0.95)
params_of = functools.partial(random_params, deviation=0.3)


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(1, VOCAB, length).tolist()


class Client:
    """A request in an engine, and what it was told."""

    def __init__(self, served: Engine, request: Request):
        self.tokens: list[Token] = []
        self.prompt: list[Token] | None = None
        self.finish: str | None = None
        self.began, self.ended = threading.Event(), threading.Event()
        self.ticket = served.submit(request, self.take)

    def take(self, piece: Piece) -> None:
        self.tokens += piece.tokens
        self.prompt = self.prompt or piece.prompt
        self.finish = piece.finish
        self.began.set()
        if piece.finish:
            self.ended.set()

    def ids(self) -> list[int]:
        assert self.ended.wait(120)
        return [token.id for token in self.tokens]


@pytest.fixture(scope="module")
def served():
    with_rows = Engine(LLAMA, params_of(LLAMA), max_rows=4, max_waiting=16)
    with_rows.start()
    yield with_rows
    with_rows.close()


def alone(request: Request, config: ModelConfig = LLAMA) -> decode.Completion:
    """What `llm.generate` with the request's seed draws."""
    keys = prompt_keys(jax.random.key(request.seed or 0), [request.prompt])
    return decode.generate(
        config, params_of(config), [request.prompt], keys, request.sampling, request.max_new_tokens,
        [*request.stop_ids],
    )[0]  # fmt: skip


def test_each_request_of_a_crowd_gets_what_it_gets_alone(served):
    """More requests than rows, greedy and sampled, arriving while others run."""
    requests = [
        Request(prompt(length), 25 + 4 * i, SAMPLED if i % 2 else GREEDY, seed=3)
        for i, length in enumerate((5, 12, 1, 9, 16, 7))
    ]
    clients = []
    for request in requests:
        clients.append(Client(served, request))
        clients[max(0, len(clients) - 3)].began.wait(120)
    drawn = [client.ids() for client in clients]
    for request, ids in zip(requests, drawn, strict=True):
        assert ids == alone(request).token_ids
    assert len({i for ids in drawn for i in ids}) > 20
    again = [Client(served, request).ids() for request in requests[:2]]
    assert again == drawn[:2]
    assert served.status().running == served.status().waiting == 0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"window": 6}, id="window"),
        pytest.param({"sparsity": Sparsity(3, 2, 1)}, id="sparse", marks=pytest.mark.slow),
        pytest.param({"moe": MoEConfig(4, 2, shared_mlp_dim=10)}, id="experts", marks=pytest.mark.slow),
    ],
)
def test_other_shapes_too(change):
    config: Any = dataclasses.replace(LLAMA, **change)
    own = Engine(config, params_of(config), max_rows=2)
    own.start()
    requests = [Request(prompt(length), 30) for length in (9, 14)]
    clients = [Client(own, request) for request in requests]
    assert [client.ids() for client in clients] == [alone(r, config).token_ids for r in requests]
    own.close()


def test_a_ring_that_turns(served):
    """Two requests after each other take more steps than the ring has slots."""
    request = Request(prompt(4), 100)
    assert [Client(served, request).ids() for _ in range(2)] == [alone(request).token_ids] * 2
    assert served.status().slots == 128


def test_a_prompt_of_several_pieces(served):
    """Read while another request runs, for which the ring grows."""
    long, short = Request(prompt(270), 30), Request(prompt(4), 100)
    clients = [Client(served, request) for request in (short, long, long)]
    assert [client.ids() for client in clients] == [alone(r).token_ids for r in (short, long, long)]


@functools.cache
def log_softmax(ids: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities of every next token after each of `ids`, from the forward pass without a cache."""
    model, tokens = blueprint(LLAMA), jnp.asarray([ids])
    bound = model.bind(params_of(LLAMA))
    hidden = bound(tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens)).hidden
    return np.asarray(jax.nn.log_softmax(bound.logits(hidden)[0]))


def test_log_probabilities_are_the_full_passes(served):
    """Of the prompt and of what follows, with the likeliest tokens; of a prompt alone, nothing is drawn."""
    request = Request(prompt(12), 10, SAMPLED, seed=1, top=5, score_prompt=True)
    client = Client(served, request)
    ids = client.ids()
    log_p = log_softmax((*request.prompt, *ids))[:-1]
    assert client.prompt is not None
    told = [*client.prompt, *client.tokens]
    assert [token.id for token in told] == [*request.prompt[1:], *ids]
    for token, row in zip(told, log_p, strict=True):
        assert_allclose(token.log_probability, row[token.id], rtol=1e-4, atol=1e-5)
        assert [i for i, _ in token.top] == np.argsort(-row)[:5].tolist()
        assert_allclose([p for _, p in token.top], np.sort(row)[::-1][:5], rtol=1e-4, atol=1e-5)
    scored = Client(served, Request(prompt(12), 0, top=1, score_prompt=True))
    assert scored.ids() == [] and scored.finish == "length" and len(scored.prompt or []) == 11


def test_a_stop_token_ends_a_request(served):
    free = Client(served, Request(prompt(5), 30)).ids()
    stop = next(i for i in free[5:] if i not in free[:5])
    client = Client(served, Request(prompt(5), 30, stop_ids=frozenset([stop])))
    assert client.ids() == free[: free.index(stop) + 1] and client.finish == "stop"
    assert Client(served, Request(prompt(5), 30, stop_ids=frozenset([free[0]]))).ids() == free[:1]


def test_equal_prompts_differ_by_repeat_and_without_a_seed(served):
    requests = [Request(prompt(5), 20, SAMPLED, seed, repeat) for seed, repeat in ((7, 0), (7, 1), (None, 0))]
    drawn = [Client(served, request).ids() for request in [*requests, requests[2]]]
    assert len({tuple(ids) for ids in drawn}) == 4
    keys = prompt_keys(jax.random.key(7), [prompt(5)] * 2)
    both = decode.generate(LLAMA, params_of(LLAMA), [prompt(5)] * 2, keys, SAMPLED, 20)
    assert drawn[:2] == [row.token_ids for row in both]


def test_cancelling_frees_the_row(served):
    clients = [Client(served, Request(prompt(3), 300)) for _ in range(5)]
    assert clients[0].began.wait(60)
    for client in clients:
        client.ticket.cancel()
    for client in clients:
        client.ids()
        assert client.finish == "cancelled" and len(client.tokens) < 300
    while served.status().running:
        time.sleep(0.01)
    assert Client(served, Request(prompt(5), 3)).ids() == alone(Request(prompt(5), 3)).token_ids


def test_no_more_wait_than_may():
    idle = Engine(LLAMA, params_of(LLAMA), max_waiting=2)  # not started: nothing leaves the queue
    clients = [Client(idle, Request([1], 1)) for _ in range(2)]
    with pytest.raises(Busy):
        Client(idle, Request([1], 1))
    idle.start()
    assert [len(client.ids()) for client in clients] == [1, 1]
    idle.close()
    with pytest.raises(Busy):
        Client(idle, Request([1], 1))


def test_closing_ends_all():
    own = Engine(LLAMA, params_of(LLAMA), max_rows=1)
    own.start()
    clients = [Client(own, Request([1], 300)) for _ in range(2)]
    clients[0].began.wait(60)
    own.close()
    for client in clients:
        client.ids()
        assert client.finish == "cancelled"


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request([], 4), "prompt is empty"),
        (Request([1, VOCAB], 4), "outside the vocabulary"),
        (Request([-1], 4), "outside the vocabulary"),
        (Request([1] * 300, 21), r"300 tokens and 21 new ones are 321.*context of 320"),
        (Request([1], -1), "at least 0"),
        (Request([1], 4, top=21), "0 to 20"),
    ],
)
def test_impossible_requests_are_named(served, request_, named):
    with pytest.raises(UserError, match=named):
        served.submit(request_, lambda piece: None)


def test_a_fault_ends_the_requests_that_it_hits_and_no_more(served, monkeypatch):
    """One in a prompt alone, one in a step those that run; then the engine goes on."""
    programs = served._programs

    def prefill(params, cache, tokens, *rest, **named):
        if tokens[0, -1] == 60:
            raise RuntimeError("a fault in a prompt")
        return programs.prefill(params, cache, tokens, *rest, **named)

    monkeypatch.setattr(served, "_programs", programs._replace(prefill=prefill))
    bad, good = Client(served, Request([60], 5)), Client(served, Request(prompt(5), 5))
    assert bad.ids() == [] and bad.finish == "error"
    assert good.ids() == alone(Request(prompt(5), 5)).token_ids

    def step(params, ring, *rest):
        programs.step(params, ring, *rest)  # takes the ring
        raise RuntimeError("a fault in a step")

    monkeypatch.setattr(served, "_programs", programs._replace(step=step))
    bad = Client(served, Request(prompt(5), 5))
    assert len(bad.ids()) == 1 and bad.finish == "error"
    monkeypatch.setattr(served, "_programs", programs)
    assert Client(served, Request(prompt(5), 5)).ids() == alone(Request(prompt(5), 5)).token_ids


def test_what_a_client_raises_is_its_own(served):
    def refuse(piece):
        raise RuntimeError("gone")

    served.submit(Request(prompt(3), 300), refuse)
    assert len(Client(served, Request(prompt(3), 5)).ids()) == 5
    while served.status().running:
        time.sleep(0.01)


def test_the_ring_shrinks_when_it_has_been_too_large(served, monkeypatch):
    monkeypatch.setattr(engine, "_PATIENCE", 3)
    request = Request(prompt(4), 120)
    last, *others = [Client(served, r) for r in (request, *[Request(prompt(4), 40)] * 3)]
    for client in others:
        client.ids()
    assert served.status().rows == 4
    assert last.ids() == alone(request).token_ids
    assert (served.status().rows, served.status().slots) == (1, 128)


def test_an_empty_ring_takes_the_size_that_is_needed(served):
    for count, rows in ((4, 4), (1, 1)):
        for client in [Client(served, Request(prompt(4), 60)) for _ in range(count)]:
            client.ids()
        assert served.status().rows == rows
