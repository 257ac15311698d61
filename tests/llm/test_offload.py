"""The optimizer's state in the host's memory: where it lies, and that nothing else changes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_step import MODEL, TRAIN, packed_batch

from core.mesh import make_mesh
from core.optim import make_optimizer
from core.options import MeshConfig, OptimizerConfig
from core.state import init_state
from llm.model.transformer import blueprint
from llm.step import jit_train_step, put_batch


def run(offload: bool, name: str, mesh: MeshConfig):
    model, where = blueprint(MODEL), make_mesh(mesh)
    options = OptimizerConfig(name=name, learning_rate=0.01, offload=offload)
    optimizer = make_optimizer(options, 5, model.decay, model.axes)
    with jax.set_mesh(where):
        state = init_state(model, TRAIN, optimizer, where, seed=0)
        step = jit_train_step(model, TRAIN, optimizer, where)
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim > 1}
        for i in range(3):
            state, _ = step(state, put_batch(packed_batch(i), where))
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim > 1} == kinds
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
    return kinds, jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_offloading_changes_where_the_state_lies_and_no_bit_of_it(name):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    (here, kept), (there, offloaded) = run(False, name, mesh), run(True, name, mesh)
    assert (here, there) == ({"device"}, {"pinned_host"})
    jax.tree.map(np.testing.assert_array_equal, kept, offloaded)
