"""The plan against calculations by hand, and against the programs that it is a plan of."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from programs import equations, products

from core.config import load
from core.devices import DEVICES
from core.mesh import AXES, make_mesh
from core.options import MeshConfig, OptimizerConfig, RunConfig
from launch.plan import memory
from launch.plan.calibration import ROWS, outcomes
from launch.plan.communication import exchanges
from launch.plan.compiled import compile_step, lower
from launch.plan.layout import Layout
from launch.plan.plan import make_plan, remedies
from launch.plan.program import collectives, ring_bytes
from launch.plan.roofline import bandwidth, empty_flops_per_token, recomputed_flops_per_token
from launch.plan.sweep import meshes, sweep
from llm.config import DataConfig, Experiment, TrainConfig
from llm.data.loader import Batch
from llm.model.config import ModelConfig, MoEConfig
from llm.model.flops import matmul_parameters, training_flops_per_token
from llm.model.transformer import Compute, blueprint
from llm.step import objective

CONFIGS = Path(__file__).parents[2] / "configs" / "llm"
A100 = DEVICES["a100-80gb"]
MODEL = ModelConfig(
    vocab_size=512, num_layers=4, embed_dim=128, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=256,
    max_length=1024,
)  # fmt: skip

EXPERTS = {"moe": MoEConfig(num_experts=8, top_k=2, balance_loss=0.01, capacity=1.25)}
SHARED = {"moe": dataclasses.replace(EXPERTS["moe"], shared_mlp_dim=64, normalize_top_k=False)}


def small(mesh: MeshConfig, optimizer: str = "adamw", model: dict | None = None, **train) -> Experiment:
    train = {"steps": 5, "dtype": "float32", "remat": "full", "loss_chunk": 64} | train
    return Experiment(
        run=RunConfig(name="small"),
        data=DataConfig(sequence_length=256, batch_size=16),
        model=dataclasses.replace(MODEL, **(model or {})),
        train=TrainConfig(**train),
        mesh=mesh,
        optimizer=OptimizerConfig(name=optimizer),
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama3-70b", 70_553_706_496),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_parameters_of_known_shapes(name, count):
    plan = make_plan(load(Experiment, CONFIGS / f"{name}.yaml"), "a100-80gb", A100)
    assert plan.as_json(1, None)["parameters"] == count


def test_a_small_model_by_hand():
    """Two layers of D=8, H=2, G=1, K=4, F=16, V=32 over fsdp=2, tensor=... 1; 4 rows of 8, two
    microbatches.
    """
    experiment = Experiment(
        run=RunConfig(name="hand"),
        data=DataConfig(sequence_length=8, batch_size=8),
        model=ModelConfig(
            vocab_size=32, num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=16,
            max_length=8,
        ),
        train=TrainConfig(steps=1, dtype="bfloat16", remat="dots", accumulation=2, loss_chunk=4),
        mesh=MeshConfig(data=1, fsdp=2),
    )  # fmt: skip
    layout = Layout.of(experiment)
    kernels = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # of a layer: query, key and value, out; mlp
    whole = 2 * (kernels + 2 * 8) + 2 * 32 * 8 + 8  # norms; table and head; final norm
    on_one = (2 * kernels + 2 * 32 * 8) // 2 + 2 * 2 * 8 + 8  # norms are not divided
    assert layout.parameter_bytes == 4 * on_one and whole == 1704
    assert layout.optimizer_bytes == 2 * 4 * on_one + 2 * 4  # and two counters
    assert layout.rows == 2 and layout.tokens == 16
    # x, out: 8 each; query 8, key and value 4 each; gate and up 16 each; two bytes
    assert memory.kept_by_layer(layout, "dots") == 2 * 16 * (8 + 8 + 8 + 2 * 4 + 2 * 16)
    assert memory.kept_by_layer(layout, "full") == 2 * 16 * 8
    backward = memory.at("backward", layout)
    assert backward["gradients"] == 2 * 4 * on_one  # sums so far, and this microbatch's
    assert backward["activations"] == 2 * memory.kept_by_layer(layout, "dots")
    assert backward["buffers"] == 2 * 2 * kernels + 4 * 8 * 16
    assert memory.at("loss", layout)["logits"] == 2 * 4 * 32 * (4 + 4 + 2) + 6 * 32 * 8 + 2 * 2 * 16 * 8
    sent = {(one.what, one.kind): 0.0 for one in exchanges(layout)}
    for one in exchanges(layout):
        assert one.axis == "fsdp"
        sent[one.what, one.kind] += one.sent
    # Of two devices each sends half of what is gathered: kernels twice for each microbatch, two bytes each.
    assert sent["weights", "all-gather"] == 2 * (2 * 2 * kernels * 2 + 32 * 8 * (4 + 2)) / 2
    assert sent["gradients", "reduce-scatter"] == 2 * (2 * kernels + 2 * 32 * 8) * 4 / 2
    assert sent["gradients", "all-reduce"] == 2 * (4 * 8 + 8) * 4 * 2 / 2


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_kinds_sum_to_the_peak(remat, accumulation):
    plan = make_plan(
        small(MeshConfig(data=2, fsdp=4), remat=remat, accumulation=accumulation), "h100", DEVICES["h100"]
    )
    answer = plan.as_json(1, None)
    assert sum(answer["bytes_per_device"].values()) == answer["peak_bytes_per_device"]
    most = max(sum(memory.at(moment, plan.layout).values()) for moment in memory.MOMENTS)
    assert answer["peak_bytes_per_device"] == most


MESHES = [
    (MeshConfig(data=8), {}),
    (MeshConfig(data=1, fsdp=2, tensor=2, context=2), {"accumulation": 2, "dtype": "bfloat16"}),
    (MeshConfig(data=1, fsdp=8), {"remat": "dots"}),
    (MeshConfig(data=2, fsdp=2, tensor=2), {"accumulation": 2, "dtype": "bfloat16"}),
    (MeshConfig(data=1, expert=8), {"model": EXPERTS}),
    (MeshConfig(data=1, fsdp=2, expert=4), {"model": EXPERTS, "remat": "dots", "dtype": "bfloat16"}),
    (MeshConfig(data=1, expert=4, tensor=2), {"model": EXPERTS}),
    (MeshConfig(data=2, fsdp=2, tensor=2), {"remat": "none", "dtype": "bfloat16"}),
    (MeshConfig(data=1, fsdp=2, tensor=4), {"remat": "dots", "model": {"tied_head": True}}),
    (MeshConfig(data=2, context=4), {}),
    (MeshConfig(data=2, fsdp=2, context=2), {"remat": "dots", "dtype": "bfloat16"}),
    (MeshConfig(data=1, fsdp=4, tensor=2), {"model": {"qk_norm": True, "bias": "qkv"}}),
    (
        MeshConfig(data=2, fsdp=2, tensor=2),
        {"model": {"norm": "layer", "activation": "gelu", "bias": "all", "parallel_residual": True}},
    ),
    (MeshConfig(data=1, fsdp=2, tensor=2, context=2), {"remat": "dots"}),
    (MeshConfig(data=1, fsdp=8), {"model": EXPERTS}),
    (MeshConfig(data=1, expert=4, tensor=2), {"model": EXPERTS, "remat": "dots", "dtype": "bfloat16"}),
    (MeshConfig(data=2, fsdp=2, expert=2), {"model": EXPERTS, "remat": "dots", "accumulation": 2}),
    (MeshConfig(data=1, fsdp=2, tensor=2, expert=2), {"model": EXPERTS, "remat": "none"}),
    (MeshConfig(data=1, fsdp=2, tensor=2, expert=2), {"model": SHARED}),
    (MeshConfig(data=1, fsdp=2, tensor=2, expert=2), {"model": SHARED, "remat": "dots"}),
    (MeshConfig(data=1, fsdp=2, tensor=2, expert=2), {"model": EXPERTS | {"parallel_residual": True}}),
    (MeshConfig(data=1, fsdp=2, context=2, expert=2), {"model": EXPERTS, "remat": "dots"}),
    (MeshConfig(data=2, context=2, expert=2), {"model": EXPERTS, "remat": "none"}),
    (MeshConfig(data=1, tensor=2, context=2, expert=2), {"model": EXPERTS, "remat": "dots"}),
]


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MESHES[8:]]


@pytest.mark.parametrize(("mesh", "changes"), [*MESHES[:8], *SLOW], ids=str)
def test_exchanges_are_those_of_the_compiled_step(mesh, changes):
    """Bytes along each axis, but for a few scalars: losses and norms."""
    experiment = small(mesh, **changes)
    program = compile_step(experiment)
    expected: dict[str, float] = {}
    for one in exchanges(Layout.of(experiment)):
        expected[one.axis] = expected.get(one.axis, 0.0) + one.sent
    assert expected.keys() == program.collective_bytes.keys()
    for axis, sent in expected.items():
        assert sent == pytest.approx(program.collective_bytes[axis], abs=200)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_memory_grows_with_layers_as_in_the_compiled_step(remat):
    """In float32, which the CPU doesn't widen: what a layer adds to state and to temporaries."""
    mesh, found = MeshConfig(data=1, fsdp=2, tensor=2), []
    for layers in (8, 12):
        experiment = small(mesh, remat=remat, model={"num_layers": layers})
        program = lower(experiment, make_mesh(mesh, jax.devices()[:4])).compile().memory_analysis()
        found.append((program, memory.at("backward", Layout.of(experiment))))
    (before, less), (after, more) = found
    state = sum(more[kind] - less[kind] for kind in ("weights", "optimizer"))
    assert after.argument_size_in_bytes - before.argument_size_in_bytes == state
    grown = sum(more[kind] - less[kind] for kind in ("gradients", "activations"))
    assert after.temp_size_in_bytes - before.temp_size_in_bytes == grown


@pytest.mark.parametrize(
    ("remat", "mesh"),
    [
        ("dots", MeshConfig(data=1, expert=2, tensor=2)),
        pytest.param("full", MeshConfig(data=1, fsdp=2, expert=2), marks=pytest.mark.slow),
        pytest.param("full", MeshConfig(data=1, expert=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_memory_of_experts_grows_with_layers_as_in_the_compiled_step(remat, mesh):
    """To the byte, but for one more copy of the routers, which the CPU makes."""
    found = []
    for layers in (8, 12):
        experiment = small(mesh, remat=remat, model=EXPERTS | {"num_layers": layers})
        layout = Layout.of(experiment)
        program = lower(experiment, make_mesh(mesh, jax.devices()[:4])).compile().memory_analysis()
        found.append((program, memory.at("backward", layout)))
    (before, less), (after, more) = found
    state = sum(more[kind] - less[kind] for kind in ("weights", "optimizer"))
    assert after.argument_size_in_bytes - before.argument_size_in_bytes == state
    grown = sum(more[kind] - less[kind] for kind in ("gradients", "activations"))
    (router,) = (4 * p.share(layout.mesh) for p in layout.parameters if p.of_router)
    assert after.temp_size_in_bytes - before.temp_size_in_bytes == grown + 4 * router


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize(
    "model",
    [
        {},
        EXPERTS,
        SHARED,
        {"moe": dataclasses.replace(EXPERTS["moe"], capacity=None)},
        {"norm": "layer", "activation": "gelu", "bias": "all", "parallel_residual": True},
        {"qk_norm": True, "bias": "qkv"},
    ],
    ids=str,
)
def test_what_a_layer_keeps_is_what_jax_keeps(remat, model):
    """The stacks that the forward pass over layers leaves for the backward pass, traced in bfloat16."""
    experiment = small(MeshConfig(data=1), dtype="bfloat16", remat=remat, model=model)
    layers, layout = experiment.model.num_layers, Layout.of(experiment)
    forward = next(
        e
        for e, _ in equations(traced(experiment))
        if e.primitive.name == "scan" and e.params["length"] == layers
    )
    stacks = forward.outvars[forward.params["num_carry"] :]
    statistics = 3 * 4 * layers if experiment.model.moe else 0  # of routing
    kept = sum(out.aval.size * out.aval.dtype.itemsize for out in stacks) - statistics
    assert layers * memory.kept_by_layer(layout, remat) == kept


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("model", [{}, EXPERTS, SHARED], ids=str)
def test_operations_are_those_of_the_traced_products(remat, model):
    """Of products with weights, also in empty slots; attention's blocks compute some that the mask hides."""
    experiment = small(MeshConfig(data=1), remat=remat, model=model)
    config, layout, length = experiment.model, Layout.of(experiment), 256
    attention = training_flops_per_token(config, length) - 6 * matmul_parameters(config)
    again = {"none": 1 / 6, "dots": 1 / 2, "full": 1 / 2}[remat] * attention
    planned = 6 * matmul_parameters(config) + empty_flops_per_token(layout)
    planned += recomputed_flops_per_token(config, length, remat) - again
    found = 0
    for product, flops in products(traced(experiment)):
        _, batch = product.params["dimension_numbers"]
        found += flops if batch != ((0, 1), (0, 1)) else 0  # attention's are of rows and key-value heads
    assert found == pytest.approx(layout.step_tokens * planned)


def traced(experiment: Experiment):
    """The loss's gradient on one device."""
    train = experiment.train
    blue = blueprint(experiment.model, Compute(train.dtype, "blockwise", train.remat))
    ids, weights = jax.ShapeDtypeStruct((16, 256), jnp.int32), jax.ShapeDtypeStruct((16, 256), jnp.float32)
    batch = Batch(ids, ids, ids, ids, weights)
    gradient = jax.grad(lambda params, batch: objective(blue, train, params, batch, 1.0), has_aux=True)
    return jax.make_jaxpr(gradient)(blue.shapes, batch).jaxpr


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_the_state_is_the_compiled_steps_arguments(optimizer):
    experiment = small(MeshConfig(data=2, fsdp=2, tensor=2), optimizer, average=0.9)
    layout = Layout.of(experiment)
    held = memory.at("update", layout)
    arguments = (
        lower(experiment, make_mesh(experiment.mesh)).compile().memory_analysis().argument_size_in_bytes
    )
    batch = 5 * 4 * 16 * 256 // 4 + 4  # five arrays over data and fsdp; the step
    assert arguments == held["weights"] + held["optimizer"] + batch


def test_ring_algorithms_by_hand():
    assert ring_bytes("all-gather", 80, 8) == ring_bytes("reduce-scatter", 80, 8) == 70
    assert ring_bytes("all-reduce", 80, 8) == 140
    assert ring_bytes("all-to-all", 80, 8) == 70
    assert ring_bytes("collective-permute", 80, 8) == 80
    assert ring_bytes("all-reduce", 80, 1) == 0


HLO = """
%cond.1 (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body.1 (p.1: (s32[], bf16[4,4])) -> (s32[], bf16[4,4]) {
  %p.1 = (s32[], bf16[4,4]) parameter(0)
  %x = bf16[4,4]{1,0} get-tuple-element(%p.1), index=1
  %g = bf16[8,4]{1,0} all-gather(%x), replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  %g.1 = bf16[8,4]{1,0} all-gather(%x), replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  %s = f32[8,4]{1,0} all-reduce(%g), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %c = bf16[8,4]{1,0} convert(%s)
  %d = bf16[4,4]{1,0} dynamic-slice(%c, %i, %i), dynamic_slice_sizes={4,4}
  ROOT %t = (s32[], bf16[4,4]) tuple(%i, %d)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %w = (s32[], bf16[4,4]) while(%a), condition=%cond.1, body=%body.1
  %r = f32[4]{0} all-reduce(%a), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b'}, to_apply=%add
  ROOT %q = f32[4]{0} collective-permute(%r), source_target_pairs={{0,4},{4,0}}
}
"""


def test_a_program_is_read_as_an_accelerator_would_run_it():
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    found = {(c.kind, c.axis, c.dtype, c.size, c.times) for c in collectives(HLO, mesh)}
    assert found == {
        ("all-gather", "fsdp", "bf16", 64, 5),  # once, though it is written twice
        ("reduce-scatter", "tensor", "bf16", 64, 5),  # half of the sum is read, cast
        ("all-reduce", "fsdp", "f32", 16, 1),
        ("all-reduce", "data", "f32", 8, 1),
        ("collective-permute", "data", "f32", 16, 1),
    }


def test_bandwidth_follows_an_axis_over_nodes():
    mesh = dict(zip(AXES, (2, 16, 4, 1, 1), strict=True))
    link, network = 0.8 * A100.link_bandwidth, 0.8 * A100.network_bandwidth
    assert bandwidth("tensor", mesh, A100) == link  # four neighbours
    assert bandwidth("fsdp", mesh, A100) == 2 * network  # two in each node
    assert bandwidth("data", mesh, A100) == network
    alone = dict(zip(AXES, (1, 64, 1, 1, 1), strict=True))
    assert bandwidth("fsdp", alone, A100) == 8 * network
    assert bandwidth("fsdp", alone, DEVICES["tpu-v5p"]) == 0.8 * DEVICES["tpu-v5p"].link_bandwidth


def test_the_fit_hits_its_rows_and_the_others_stay_near():
    errors = {(o.row.config, o.row.devices, o.row.device): o.error for o in outcomes()}
    assert all(abs(o.error) < 1e-6 for o in outcomes() if o.row.fitted)
    assert abs(errors["llama3-70b", 128, "h100"]) < 0.1
    assert sum(row.fitted for row in ROWS) == 2


def test_what_does_not_fit_gets_the_smallest_change():
    experiment = load(Experiment, CONFIGS / "llama3-8b.yaml", ["mesh.data=1", "mesh.fsdp=1"])
    plan = make_plan(experiment, "a100-80gb", A100)
    assert not plan.fits and plan.kinds["weights"] == 4 * 8_030_261_248
    note, other = next(remedies(plan, A100))
    assert other.fits and note.startswith("--mesh")
    experiment = load(Experiment, CONFIGS / "llama3-8b.yaml", ["mesh.data=1", "train.accumulation=16"])
    plan = make_plan(experiment, "a100-40gb", DEVICES["a100-40gb"])
    note, other = next(remedies(plan, DEVICES["a100-40gb"]))
    assert other.fits and note == "--set train.accumulation=32"


def test_experts_need_as_many_exchanges_as_by_hand():
    """A row of 8 tokens on each of expert=2; four experts, of which a token takes one, have 2 slots each."""
    experiment = small(MeshConfig(data=1, expert=2), remat="full")
    moe = MoEConfig(num_experts=4, top_k=1, capacity=1.0)
    model = dataclasses.replace(MODEL, moe=moe)
    data = DataConfig(sequence_length=8, batch_size=2)
    layout = Layout.of(dataclasses.replace(experiment, model=model, data=data))
    assert layout.slots == 4 * 2
    (slots,) = (one for one in exchanges(layout) if one.what == "slots")
    assert slots.kind == "all-to-all" and slots.axis == "expert"
    assert slots.sent == 4 * 6 * 8 * 128 * 4 / 2  # layers; there and back thrice; half of the float32 rows
    assert empty_flops_per_token(layout) == 0  # as many slots as choices
    kernels = 2 * 128 * 256 * 3  # of the experts of one device
    assert sum(p.share(layout.mesh) for p in layout.parameters if p.of_expert) == kernels
    summed = sum(one.size * one.times for one in exchanges(layout) if one.what == "gradients")
    dense = sum(
        4 * p.share(layout.mesh, ("expert",)) * (4 if p.stacked else 1)
        for p in layout.parameters
        if not p.of_expert
    )
    assert summed == dense


def test_all_meshes_are_tried_and_the_fastest_that_fits_is_first():
    assert len(list(meshes(8))) == math.comb(3 + 4, 4)
    assert all(math.prod(mesh.values()) == 12 for mesh in meshes(12))
    plans, tried = sweep(small(MeshConfig(data=1)), 8, "a100-80gb", A100)
    assert tried == len(plans) > 100 and {p.layout.devices for p in plans} == {8}
    assert plans[0].times.step == min(plan.times.step for plan in plans if plan.fits)
    assert {plan.layout.mesh["expert"] for plan in plans} == {1}
    plans, _ = sweep(small(MeshConfig(data=1), model=EXPERTS), 8, "a100-80gb", A100)
    assert {plan.layout.mesh["expert"] for plan in plans} == {1, 2, 4, 8}


@pytest.mark.slow
def test_every_config_lowers_for_its_target_mesh():
    """The production step, traced with abstract inputs; in a process that has devices enough."""
    done = subprocess.run(
        [sys.executable, "-c", LOWER, *sorted(map(str, CONFIGS.glob("*.yaml")))],
        capture_output=True, text=True, cwd=CONFIGS.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lowered = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert lowered.keys() == {path.stem for path in CONFIGS.glob("*.yaml")} - {"base-pretrain"}
    assert lowered["llama3-70b"] == lowered["llama2-70b"] == 512


LOWER = """
import math, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 512)
from core.config import load
from core.devices import DEVICES
from core.mesh import make_mesh
from core.options import MeshConfig
from launch.plan.compiled import lower
from launch.plan.layout import sizes
from launch.plan.plan import make_plan
from llm.config import Experiment
for path in map(Path, sys.argv[1:]):
    if path.stem == "base-pretrain":
        continue
    experiment = load(Experiment, path)
    mesh = sizes(experiment.mesh)
    count = math.prod(mesh.values())
    make_plan(experiment, "h100", DEVICES["h100"])
    lowered = lower(experiment, make_mesh(MeshConfig(**mesh), jax.devices()[:count]))
    print(path.stem, lowered.as_text().count("mhlo.num_partitions") and count)
"""
