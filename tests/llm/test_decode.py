"""Decoding with the cache against the full forward pass, against Hugging Face, and against itself."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose
from tiny import random_params

from core.errors import UserError
from core.mesh import make_mesh, shardings
from core.module import Blueprint
from core.options import MeshConfig
from llm import decode
from llm.decode import cache_slots, for_decoding, generate, left_pad, stream
from llm.model.cache import empty_cache, grow
from llm.model.config import ModelConfig, MoEConfig, Sparsity
from llm.model.transformer import Compute, Transformer, blueprint
from llm.sampling import Sampling, prompt_keys

VOCAB = 62
LLAMA = ModelConfig(
    vocab_size=VOCAB, num_layers=2, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=36,
    max_length=128,
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "window": {"window": 6},
    "sparse": {"sparsity": Sparsity(3, 2, 1)},
    "one-key-head": {"num_kv_heads": 1, "tied_head": True},
    "qwen": {"bias": "qkv", "qk_norm": True},
    "experts": {"moe": MoEConfig(4, 2, shared_mlp_dim=10)},
    "neox": {
        "num_kv_heads": 4, "norm": "layer", "activation": "gelu", "bias": "all", "rope_fraction": 0.5,
        "parallel_residual": True,
    },
}  # fmt: skip
PROMPTS = [[int(i) for i in np.random.default_rng(n).integers(1, VOCAB, n)] for n in (5, 12, 1, 9)]
GREEDY, SAMPLED = Sampling(), Sampling.of(1.5, top_k=40, top_p=0.95)


def config_of(shape: str) -> ModelConfig:
    return dataclasses.replace(LLAMA, **SHAPES[shape])


params_of = functools.partial(random_params, deviation=0.3)


@functools.cache
def full_logits(config: ModelConfig):
    model = blueprint(config)

    def run(params, tokens):
        bound, positions = model.bind(params), jnp.arange(tokens.shape[1])[None]
        return bound.logits(bound(tokens, positions, jnp.ones_like(tokens)).hidden)

    return jax.jit(run)


def log_softmax(config: ModelConfig, ids: list[int]) -> np.ndarray:
    """Log-probabilities of every next token after each of `ids`, from the forward pass without a cache."""
    padded = jnp.asarray([ids + [0] * (64 - len(ids))])  # one compiled shape; what follows is not seen
    return np.asarray(jax.nn.log_softmax(full_logits(config)(params_of(config), padded)[0, : len(ids)]))


def run(prompts, sampling=GREEDY, count=20, stop=(), keys=None, config=LLAMA):
    keys = prompt_keys(jax.random.key(3), prompts) if keys is None else keys
    return generate(config, params_of(config), prompts, keys, sampling, count, stop)


@pytest.mark.parametrize(
    ("shape", "prepared"),
    [
        *((shape, False) for shape in SHAPES),
        *(
            pytest.param(shape, True, marks=[] if shape in ("grouped", "experts") else pytest.mark.slow)
            for shape in SHAPES
        ),
    ],
)
def test_cached_logits_are_the_full_passes(shape, prepared):
    """A padded batch of prompts, read in two pieces, then token by token, in a cache that grows."""
    config = config_of(shape)
    sequences = [prompt + [(7 * i) % VOCAB for i in range(6)] for prompt in PROMPTS]
    tokens, segments = left_pad(sequences, 18)
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0)
    model, params = blueprint(config), params_of(config)
    if prepared:
        params = decode.compile_for(config).prepare(params)
        model = Blueprint.of(lambda rngs: for_decoding(Transformer(config, Compute(), rngs)))

    @jax.jit
    def step(params, cache, tokens, positions, segments):
        bound = model.bind(params)
        output = bound(tokens, positions, segments, cache)
        return bound.logits(output.hidden), output.cache

    cache, logits = empty_cache(config, len(sequences), 16), []
    for start, stop in [(0, 9), (9, 12), *((i, i + 1) for i in range(12, 18))]:
        if stop == 14:
            cache = grow(cache, 24)
        piece = (a[:, start:stop] for a in (tokens, positions, segments))
        some, cache = step(params, cache, *piece)
        logits.append(some)
    joined = np.concatenate(logits, axis=1)
    for row, ids in zip(joined, sequences, strict=True):
        ours = jax.nn.log_softmax(row[18 - len(ids) :])
        assert_allclose(ours, log_softmax(config, ids), rtol=1e-5, atol=1e-5)


def hugging_face(config: ModelConfig) -> Any:
    """`LlamaForCausalLM` with the weights of `params_of(config)`."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, num_hidden_layers=2, hidden_size=24, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=36, max_position_embeddings=128,
            rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    ours = jax.tree.map(np.asarray, params_of(config))
    state = {"model.embed_tokens": ours["embedding"], "model.norm": ours["norm"]["scale"]}
    state["lm_head"] = ours["head"]
    for i in range(2):
        block = jax.tree.map(lambda a, i=i: a[i], ours["blocks"])
        at, mlp, layer = block["attention"], block["mlp"], f"model.layers.{i}"
        for name, short in [("query", "q"), ("key", "k"), ("value", "v")]:
            state[f"{layer}.self_attn.{short}_proj"] = at[name]["kernel"].reshape(24, -1).T
        state[f"{layer}.self_attn.o_proj"] = at["out"]["kernel"].reshape(-1, 24).T
        for name in ("gate", "up", "down"):
            state[f"{layer}.mlp.{name}_proj"] = mlp[name]["kernel"].T
        state[f"{layer}.input_layernorm"] = block["attention_norm"]["scale"]
        state[f"{layer}.post_attention_layernorm"] = block["mlp_norm"]["scale"]
    model.load_state_dict({f"{k}.weight": torch.from_numpy(v.copy()) for k, v in state.items()})
    return model


def test_greedy_tokens_are_hugging_faces():
    tokens, segments = left_pad(PROMPTS, 12)
    theirs = hugging_face(LLAMA).generate(
        torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(segments).long(),
        max_new_tokens=50,
        do_sample=False,
    )[:, 12:]
    ours = run(PROMPTS, count=50)
    assert [row.token_ids for row in ours] == theirs.tolist()
    assert len({i for row in ours for i in row.token_ids}) > 10  # else any two would agree


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_log_probabilities_are_a_teacher_forced_passes(sampling):
    for prompt, row in zip(PROMPTS, run(PROMPTS, sampling), strict=True):
        log_p = log_softmax(LLAMA, prompt + row.token_ids)[len(prompt) - 1 : -1]
        assert_allclose(row.log_probabilities, log_p[np.arange(20), row.token_ids], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_gets_the_same_tokens_in_any_batch(sampling):
    together = run(PROMPTS, sampling)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert run([prompt], sampling)[0].token_ids == row.token_ids
    assert run([*PROMPTS[2:], PROMPTS[1]], sampling)[2].token_ids == together[1].token_ids


def test_keys_decide():
    prompts = [PROMPTS[0]] * 3
    a, b, c = jax.random.key(0), jax.random.key(1), jax.random.key(0)
    first, second, third = run(prompts, SAMPLED, keys=jnp.stack([a, b, c]))
    assert first.token_ids == third.token_ids != second.token_ids


def test_a_stop_token_ends_its_row_alone():
    """The prefix up to it stays as it was, it is the last token, and others go on."""
    free = run(PROMPTS, SAMPLED)
    stop = free[1].token_ids[7]
    stopped = run(PROMPTS, SAMPLED, stop=[stop, 10_000])
    for whole, row in zip(free, stopped, strict=True):
        ids = whole.token_ids
        end = ids.index(stop) + 1 if stop in ids else len(ids)
        assert row.token_ids == ids[:end]
        assert_allclose(row.log_probabilities, whole.log_probabilities[:end], rtol=1e-5)
    assert len({len(row.token_ids) for row in stopped}) > 1


@pytest.mark.parametrize("count", [1, 2, decode.CHUNK + 1, decode.CHUNK + 2])
def test_tokens_come_in_pieces_that_join(count):
    pieces = list(stream(LLAMA, params_of(LLAMA), PROMPTS[:1], keys_of(1), SAMPLED, count))
    assert len(pieces[0][0].token_ids) == 1  # the first token as soon as it is there
    ids = [i for piece in pieces for i in piece[0].token_ids]
    assert len(ids) == count
    assert ids == run(PROMPTS[:1], SAMPLED, decode.CHUNK + 2, keys=keys_of(1))[0].token_ids[:count]


def keys_of(count: int):
    return jax.random.split(jax.random.key(0), count)


def test_nothing_compiles_twice():
    run(PROMPTS, SAMPLED)
    programs: Any = decode.compile_for(LLAMA)
    before = [programs.prefill._cache_size(), programs.continue_._cache_size()]
    run(PROMPTS[::-1], SAMPLED._replace(temperature=0.3, top_k=2), count=18)
    assert before == [programs.prefill._cache_size(), programs.continue_._cache_size()]


def test_sharded_parameters_give_the_same_tokens():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.device_put(params_of(LLAMA), shardings(mesh, blueprint(LLAMA).axes))
    with jax.set_mesh(mesh):
        sharded = generate(
            LLAMA, params, PROMPTS[:3], prompt_keys(jax.random.key(3), PROMPTS[:3]), SAMPLED, 20
        )
    assert [row.token_ids for row in sharded] == [row.token_ids for row in run(PROMPTS[:3], SAMPLED)]


def test_bfloat16_is_near():
    row = generate(LLAMA, params_of(LLAMA), PROMPTS[:1], keys_of(1), Sampling(), 8, dtype="bfloat16")[0]
    log_p = log_softmax(LLAMA, PROMPTS[0] + row.token_ids)[len(PROMPTS[0]) - 1 : -1]
    assert_allclose(row.log_probabilities, log_p[np.arange(8), row.token_ids], atol=0.1)


def test_cache_sizes():
    assert [cache_slots(n, 1000) for n in (1, 64, 65, 500, 513, 1000)] == [64, 64, 128, 512, 1024, 1024]
    assert cache_slots(130, 190) == 192  # no more than will be used, to the next 64
    assert all(cache_slots(n, total) >= n for total in range(1, 300) for n in range(1, total + 1))


@pytest.mark.parametrize(
    ("prompts", "count", "named"),
    [
        ([[1] * 100], 29, r"prompt of 100 tokens and 29 new ones are 129.*model.max_length \(128\)"),
        ([[1], []], 4, "prompt is empty"),
        ([[1]], 0, "number of new tokens is 0"),
    ],
)
def test_impossible_requests_are_named(prompts, count, named):
    with pytest.raises(UserError, match=named):
        generate(LLAMA, params_of(LLAMA), prompts, keys_of(len(prompts)), Sampling(), count)
