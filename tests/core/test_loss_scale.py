"""The loss scale, held to torch.amp.GradScaler."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from numpy.testing import assert_array_equal

from core import loss_scale
from core.loss_scale import LossScale, where_finite


def test_the_scale_is_torchs(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    peer = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scale = LossScale.initial()
    assert float(scale.value) == peer.get_scale()
    for overflows in (False, False, True, False, False, False, False, True, True, False):
        optimizer.zero_grad()
        factor = float("inf") if overflows else 1.0
        peer.scale(weight.sum() * factor).backward()
        peer.step(optimizer)
        peer.update()
        scale = scale.adjusted(jnp.asarray(not overflows))
        assert float(scale.value) == peer.get_scale()


def test_an_update_that_overflowed_is_not_taken():
    new, old = {"a": jnp.array([jnp.nan, 1.0])}, {"a": jnp.array([2.0, 3.0])}
    assert_array_equal(where_finite(jnp.asarray(False), new, old)["a"], old["a"])
    assert_array_equal(where_finite(jnp.asarray(True), new, old)["a"], new["a"])
