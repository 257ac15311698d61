"""Experts against a dense reference, torch, a count by hand, and themselves on other meshes."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import torch
from numpy.testing import assert_allclose
from programs import collectives, partitioned
from test_step import LENGTH, MODEL, ROWS, SGD, TRAIN, assert_same_course, packed_batch
from tiny import experiment, random_params
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from core.config import parse
from core.errors import UserError
from core.mesh import make_mesh, shardings
from core.module import Blueprint
from core.optim import make_optimizer
from core.options import MeshConfig, OptimizerConfig
from core.state import init_state
from llm.data.loader import Batch
from llm.decode import generate
from llm.model.config import ModelConfig, MoEConfig
from llm.model.moe import MoE
from llm.model.ragged import check_path
from llm.model.transformer import Compute, blueprint
from llm.sampling import Sampling, prompt_keys
from llm.setup import check_mesh
from llm.step import gradients, jit_train_step

EXPERTS = MoEConfig(num_experts=8, top_k=2, shared_mlp_dim=16, balance_loss=0.1, router_z_loss=0.01)
SPARSE = dataclasses.replace(MODEL, moe=EXPERTS)


def layer(moe: MoEConfig, path="padded") -> Blueprint:
    config = dataclasses.replace(MODEL, moe=moe)
    return Blueprint.of(lambda rngs: MoE(config, path, rngs))


def random_layer(moe: MoEConfig):
    """Random weights of a layer, and an input for it."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), layer(moe).shapes)
    return params, jnp.asarray(rng.normal(size=(3, 7, MODEL.embed_dim)), jnp.float32)


def every_expert(moe: MoEConfig, params, x, kept=None):
    """Every expert on every token, summed with weights that are zero where it wasn't chosen (or kept)."""
    p = jax.nn.softmax(x @ params["router"])
    chosen = jnp.argsort(-p)[..., : moe.top_k]
    mask = jax.nn.one_hot(chosen, moe.num_experts).sum(-2)
    weights = p * mask
    if moe.normalize_top_k:
        weights /= weights.sum(-1, keepdims=True)
    weights = weights if kept is None else weights * kept
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    hidden = jax.nn.silu(jnp.einsum("bsd,edf->ebsf", x, gate)) * jnp.einsum("bsd,edf->ebsf", x, up)
    return jnp.einsum("ebsf,efd,bse->bsd", hidden, down, weights)


def assert_same(got, expected):
    """Gradients, to 1e-5 of each one's largest."""
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), got, expected)


@pytest.mark.parametrize("path", ["padded", "ragged"])
@pytest.mark.parametrize("normalize", [True, False])
def test_without_drops_it_is_every_expert_on_every_token(path, normalize):
    moe = MoEConfig(num_experts=8, top_k=3, normalize_top_k=normalize)
    params, x = random_layer(moe)
    probe = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def ours(params, x):
        y, routing = layer(moe, path).bind(params)(x)
        return jnp.sum(y * probe), (y, routing.dropped_fraction)

    def reference(params, x):
        y = every_expert(moe, params, x)
        return jnp.sum(y * probe), (y, 0.0)

    got, (y, dropped) = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(params, x)
    expected, (z, _) = jax.jit(jax.grad(reference, (0, 1), has_aux=True))(params, x)
    assert dropped == 0
    assert_allclose(y, z, rtol=0, atol=2e-6 * np.abs(z).max())
    assert_same(got, expected)


def test_shared_experts_are_deepseeks():
    moe = MoEConfig(num_experts=6, top_k=2, normalize_top_k=False, shared_mlp_dim=2 * MODEL.mlp_dim)
    params, x = random_layer(moe)
    config = DeepseekV2Config(
        hidden_size=MODEL.embed_dim,
        moe_intermediate_size=MODEL.mlp_dim,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=2,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    )
    theirs = DeepseekV2Moe(config)
    turned = lambda *kernels: np.concatenate(kernels, -1).swapaxes(-1, -2)  # noqa: E731
    weights = {"gate.weight": turned(params["router"])}
    kernels = {name: params[name]["kernel"] for name in ("gate", "up", "down")}
    weights["experts.gate_up_proj"] = turned(kernels["gate"], kernels["up"])
    weights["experts.down_proj"] = turned(kernels["down"])
    for name, linear in params["shared"].items():
        weights[f"shared_experts.{name}_proj.weight"] = turned(linear["kernel"])
    theirs.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in weights.items()})
    expected = theirs(torch.from_numpy(np.array(x))).detach().numpy()
    y, _ = layer(moe).bind(params)(x)
    assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.5])
def test_what_finds_no_slot_is_dropped_and_counted(capacity):
    """Slots are given out one by one: all first choices by token, then all second ones."""
    moe = MoEConfig(num_experts=8, top_k=2, capacity=capacity)
    params, x = random_layer(moe)
    slots = int(np.ceil(capacity * 21 * 2 / 8))
    chosen = np.argsort(-np.asarray(x @ params["router"]).reshape(21, 8))[:, :2]
    kept, used = np.zeros((21, 8)), np.zeros(8, int)
    for rank in range(2):
        for token in range(21):
            expert = chosen[token, rank]
            kept[token, expert] = used[expert] < slots
            used[expert] += 1
    y, routing = layer(moe).bind(params)(x)
    assert 0 < routing.dropped_fraction < 1
    assert_allclose(routing.dropped_fraction, 1 - kept.sum() / 42, rtol=1e-6)
    expected = every_expert(moe, params, x, jnp.asarray(kept.reshape(3, 7, 8)))
    assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    nowhere = kept.reshape(3, 7, 8).sum(-1) == 0
    assert capacity > 0.5 or nowhere.any()
    assert np.all(np.asarray(y)[nowhere] == 0)  # the residual passes them by
    whole, none = layer(moe).bind(params)(x, dropless=True)
    assert none.dropped_fraction == 0 and np.abs(whole - y).max() > 0.01


def test_losses_of_even_and_of_one_sided_routing():
    """k where experts and probabilities are even; where all choose the same k, E times their probability."""
    moe = MoEConfig(num_experts=8, top_k=2)
    params, _ = random_layer(moe)
    x = jnp.tile(jnp.eye(MODEL.embed_dim)[:8], (2, 1, 1))
    towards = jnp.zeros_like(params["router"])
    even = params | {"router": towards.at[:8, :8].set(jnp.eye(8) * 3 + jnp.roll(jnp.eye(8), 1, 1) * 2)}
    assert_allclose(layer(moe).bind(even)(x)[1].balance_loss, 2, rtol=1e-6)
    same = params | {"router": towards.at[:, 0].set(50.0).at[:, 1].set(49.0)}
    routing = layer(moe).bind(same)(x)[1]
    assert_allclose(routing.balance_loss, 8, rtol=1e-6)
    assert_allclose(routing.router_z_loss, (50 + np.log(1 + np.exp(-1))) ** 2, rtol=1e-6)


def run(options: MeshConfig, train=TRAIN, devices=None):
    return test_step.run(options, train, devices=devices, config=SPARSE)


@functools.cache
def one_device():
    return run(MeshConfig(data=1), devices=jax.devices()[:1])


MESHES = [
    MeshConfig(data=1, expert=8),
    MeshConfig(data=1, fsdp=4, expert=2),
    MeshConfig(data=1, tensor=2, expert=4),
    MeshConfig(data=2, context=2, expert=2),
    MeshConfig(data=1, fsdp=2, tensor=2, expert=2),
]
SLOWLY = [pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[1:4]]


@pytest.mark.parametrize("options", [MESHES[0], *SLOWLY, MESHES[4]], ids=str)
def test_sharded_equals_unsharded(options):
    got, expected = run(options), one_device()
    assert_same_course(got, expected)
    for ours, theirs in zip(got[0], expected[0], strict=True):
        for name in ("balance_loss", "router_z_loss"):
            assert_allclose(ours[name], theirs[name], rtol=1e-5)
        assert ours["dropped_fraction"] == 0


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What its documentation says, with every row sent everywhere: the CPU has no such collective."""
    me = jax.lax.axis_index(axis_name)
    everywhere = [
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    ]
    rows = jnp.arange(output.shape[0])
    for sender in range(jax.lax.axis_size(axis_name)):
        sent, begin, size, put = (a[sender] for a in everywhere)
        inside = (rows >= put[me]) & (rows < put[me] + recv_sizes[sender])
        came = sent.at[rows - put[me] + begin[me]].get(mode="fill", fill_value=jnp.nan)
        output = jnp.where((inside & (size[me] == recv_sizes[sender]))[:, None], came, output)
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        MeshConfig(data=1, fsdp=2, tensor=2, context=2),
        MeshConfig(data=1, fsdp=2, tensor=2, expert=2),
    ],
    ids=str,
)
def test_ragged_takes_the_same_course(options, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    assert_same_course(run(options, dataclasses.replace(TRAIN, experts="ragged")), one_device())


def test_ragged_lowers_for_a_gpu_and_is_refused_elsewhere():
    model, mesh = (
        blueprint(SPARSE, Compute("bfloat16", experts="ragged")),
        make_mesh(MeshConfig(fsdp=2, expert=4, data=1)),
    )
    train = dataclasses.replace(TRAIN, dtype="bfloat16")
    tx = make_optimizer(SGD, 5, model.decay, model.axes)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(model, train, tx, mesh, seed=0))
        traced = jit_train_step(model, train, tx, mesh).trace(state, packed_batch(0))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@ragged_all_to_all(") == 4  # there and back, forward and backward
    assert text.count("chlo.ragged_dot") >= 9  # three products, each with two more for its gradients
    for platform in ("cpu", "tpu"):
        with pytest.raises(UserError, match=rf"ragged.*needs a GPU.*{platform}.*set it to padded"):
            check_path("ragged", platform, EXPERTS)
    with pytest.raises(UserError, match=r"drops nothing.*capacity is 1.5: set that to null"):
        check_path("ragged", "gpu", MoEConfig(8, 2, capacity=1.5))
    with pytest.raises(UserError, match="no experts"):
        check_path("ragged", "gpu", None)
    check_path("ragged", "gpu", EXPERTS)
    check_path("padded", "cpu", None)


def lowered(options: MeshConfig, function, dtype="float32"):
    attention = "ring" if options.context > 1 else "reference"
    model, mesh = blueprint(SPARSE, Compute(dtype, attention)), make_mesh(options)
    places = shardings(mesh, model.axes), shardings(mesh, ("act_batch", "act_seq"))
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(function, model), in_shardings=places)
        return partitioned(run.lower(model.shapes, packed_batch(0)))


def forward(model, params, batch: Batch):
    output = model.bind(params)(batch.tokens, batch.positions, batch.segment_ids)
    return output.hidden, output.routing


@pytest.mark.parametrize("options", MESHES, ids=str)
def test_two_all_to_alls_take_tokens_to_experts_and_back(options):
    """And where nothing else is divided, no other collective moves anything the size of tokens or experts."""
    found = collectives(lowered(options, forward))
    rows = ROWS * LENGTH // 8 * options.expert  # of an expert, from the devices that have its tokens
    here = EXPERTS.num_experts // options.expert
    moved = [shape for kind, shape, _ in found if kind == "all-to-all" and len(shape) == 3]
    assert sorted(moved) == sorted(
        [(here, rows, MODEL.embed_dim), (EXPERTS.num_experts, ROWS * LENGTH // 8, MODEL.embed_dim)]
    )
    if options.expert == 8:
        others = [shape for kind, shape, _ in found if kind != "all-to-all"]
        router = MODEL.embed_dim * EXPERTS.num_experts
        assert all(np.prod(shape) <= router for shape in others)
        assert [kind for kind, *_ in found].count("all-to-all") == 2


def test_kernels_are_gathered_in_bfloat16_and_their_gradients_summed_in_float32():
    def gradient(model, params, batch):
        train = dataclasses.replace(TRAIN, dtype="bfloat16")
        return gradients(model, train, params, batch)

    hlo = lowered(MeshConfig(data=1, fsdp=4, expert=2), gradient, "bfloat16")
    shapes = "(?:4,32,64|4,64,32)"  # a device's experts, whole; XLA turns the sum of `down`
    assert set(re.findall(rf"= (\w+)\[{shapes}\]\S* all-gather\(", hlo)) == {"bf16"}
    assert re.findall(rf"= (\w+)\[{shapes}\]\S* all-reduce\(", hlo) == ["f32"] * 3
    assert set(re.findall(r"= (\w+)\[\d+,\d+,32\]\S* all-to-all\(", hlo)) == {"bf16"}


def test_the_objective_is_the_mean_loss_and_the_routers():
    """Of one batch: gradients add up, and the losses are means, whatever the scale and the accumulation."""
    shape, batch = (
        dataclasses.replace(SPARSE, num_layers=1),
        jax.tree.map(lambda x: jnp.asarray(x[:8]), packed_batch(0)),
    )
    params = jax.jit(blueprint(shape).init)(jax.random.key(0))

    def of(balance_loss, z_loss, scale=1.0, accumulation=1):
        moe = dataclasses.replace(EXPERTS, balance_loss=balance_loss, router_z_loss=z_loss)
        model = blueprint(dataclasses.replace(shape, moe=moe))
        options = dataclasses.replace(TRAIN, accumulation=accumulation)
        return jax.jit(lambda p, b, s: gradients(model, options, p, b, s))(params, batch, jnp.float32(scale))

    (plain, losses), (scaled, again) = of(0.0, 0.0), of(0.3, 0.7, scale=2.0**10)
    assert losses == again

    def routers(params):
        output = blueprint(shape).bind(params)(batch.tokens, batch.positions, batch.segment_ids)
        return 0.3 * output.routing.balance_loss + 0.7 * output.routing.router_z_loss, output.routing

    extra, routing = jax.jit(jax.grad(routers, has_aux=True))(params)
    for name, value in routing._asdict().items():
        assert_allclose(losses[name], value, rtol=1e-6)
    expected = jax.tree.map(jnp.add, plain, extra)
    assert_same(scaled, expected)

    (once, one), (often, four) = of(0.0, 0.7), of(0.0, 0.7, accumulation=4)
    assert_same(often, once)
    for name in ("loss", "router_z_loss", "dropped_fraction"):
        assert_allclose(four[name], one[name], rtol=1e-5)
    assert four["balance_loss"] > one["balance_loss"]  # each microbatch's own is less even


@pytest.mark.parametrize("compute", [Compute(remat="full"), Compute(scan_layers=False)], ids=str)
def test_remat_and_unrolling_change_nothing(compute):
    (expected, losses), (got, others) = computed(Compute()), computed(compute)
    assert_same(got, expected)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), others, losses)


@functools.cache
def computed(compute: Compute):
    params = jax.jit(blueprint(SPARSE).init)(jax.random.key(0))
    return jax.jit(functools.partial(gradients, blueprint(SPARSE, compute), TRAIN))(params, packed_batch(0))


def test_float16_takes_float32s_course():
    half = run(MeshConfig(data=1), dataclasses.replace(TRAIN, dtype="float16"), jax.devices()[:1])
    for ours, theirs in zip(half[0], one_device()[0], strict=True):
        for name in ("loss", "balance_loss", "router_z_loss"):
            assert_allclose(ours[name], theirs[name], rtol=2e-2)
        assert ours["loss_scale"] == 2.0**16


def test_decoding_drops_nothing_and_is_the_same_on_a_mesh():
    full = dataclasses.replace(SPARSE, vocab_size=62)
    tight = dataclasses.replace(full, moe=dataclasses.replace(EXPERTS, capacity=0.25))
    params, prompts = random_params(full, 0.3), [[3, 1, 4, 1, 5], [9, 2, 6]]
    keys, sampling = prompt_keys(jax.random.key(0), prompts), Sampling.of(1.0)
    expected = generate(full, params, prompts, keys, sampling, 10)
    assert len({i for row in expected for i in row.token_ids}) > 5
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, blueprint(tight).axes))
        sharded = generate(tight, placed, prompts, keys, sampling, 10)
    assert [row.token_ids for row in sharded] == [row.token_ids for row in expected]


def test_muon_turns_each_experts_matrix_by_itself():
    rng = np.random.default_rng(0)
    grads = {"up": rng.normal(size=(2, 3, 16, 24)), "router": rng.normal(size=(2, 16, 3))}
    axes = {"up": ("layers", "experts", "embed", "mlp"), "router": ("layers", "embed", "experts")}
    options = OptimizerConfig(name="muon", learning_rate=1.0, schedule="constant", weight_decay=0.0)

    def update(grads, axes):
        grads = jax.tree.map(jnp.float32, grads)
        transform = make_optimizer(options, 10, dict.fromkeys(grads, True), axes).transform
        return transform.update(grads, transform.init(grads), grads)[0]

    together = update(grads, axes)
    alone = update({"up": grads["up"].reshape(6, 16, 24)}, {"up": ("layers", "embed", "mlp")})
    assert_allclose(together["up"].reshape(6, 16, 24), alone["up"], rtol=1e-4, atol=1e-5)
    assert_allclose(np.abs(together["router"]), 1, rtol=1e-4)  # Adam's first update
    decay = blueprint(SPARSE).decay["blocks"]["mlp"]
    assert decay["router"] and decay["up"]["kernel"]


@pytest.mark.parametrize(
    ("moe", "model", "named"),
    [
        ({"num_experts": 2, "top_k": 3}, {}, r"top_k \(3\) is more than model.moe.num_experts \(2\)"),
        ({"num_experts": 4, "top_k": 2}, {"activation": "gelu"}, "experts have swiglu, and no biases"),
        ({"num_experts": 4, "top_k": 2}, {"bias": "all"}, "experts have swiglu, and no biases"),
        ({"num_experts": 4, "top_k": 2, "capacity": 0}, {}, "'moe.capacity' is 0"),
        ({"num_experts": 4, "topk": 2}, {}, "topk.*top_k"),
    ],
)
def test_impossible_experts_are_named(moe, model, named):
    with pytest.raises(UserError, match=named):
        parse(ModelConfig, dataclasses.asdict(MODEL) | model | {"moe": moe})


def test_a_mesh_that_does_not_divide_the_experts_is_named(tmp_path):
    def check(moe, **mesh):
        options = experiment(tmp_path, tmp_path, mesh={"data": 1} | mesh, model={"moe": moe} if moe else {})
        check_mesh(options, make_mesh(options.mesh))

    with pytest.raises(UserError, match=r"model.moe.num_experts \(6\) does not divide over mesh.expert=4"):
        check({"num_experts": 6, "top_k": 2}, expert=4, fsdp=2)
    with pytest.raises(UserError, match="no experts to divide"):
        check(None, expert=8)
    check({"num_experts": 8, "top_k": 2}, expert=8)
