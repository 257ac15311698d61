"""The terms of policy optimization against PyTorch, hand computations, and what they estimate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from rl import losses
from rl.distributions import Categorical, Gaussian

SHAPE = (6, 5)
RNG = np.random.default_rng(0)
LOG_PROBS, OLD, ADVANTAGES, VALUES, OLD_VALUES, RETURNS = RNG.normal(size=(6, *SHAPE)).astype(np.float32)
OLD = LOG_PROBS + 0.3 * OLD  # ratios on both sides of the bounds
MASK = RNG.random(SHAPE) < 0.6


def as_jax(mask):
    return None if mask is None else jnp.array(mask)


def torch_mean(x, mask):
    return x.mean() if mask is None else (x * torch.tensor(mask)).sum() / torch.tensor(mask).sum()


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_ppo_clip_loss_and_its_gradient_as_in_torch(mask):
    def ours(log_probs):
        return losses.ppo_clip_loss(log_probs, jnp.array(OLD), jnp.array(ADVANTAGES), 0.2, as_jax(mask))

    (loss, told), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.array(LOG_PROBS))
    log_probs = torch.tensor(LOG_PROBS, requires_grad=True)
    advantages = torch.tensor(ADVANTAGES)
    ratio = (log_probs - torch.tensor(OLD)).exp()
    # As stable-baselines3, CleanRL and TRL write it.
    theirs = torch_mean(torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)), mask)
    theirs.backward()
    assert_allclose(loss, theirs.detach(), rtol=1e-5)
    assert_allclose(gradient, log_probs.grad, rtol=1e-5, atol=1e-7)
    ratio = ratio.detach()
    assert_allclose(told["clip_fraction"], torch_mean(((ratio - 1).abs() > 0.2).float(), mask), rtol=1e-6)
    assert_allclose(told["kl"], torch_mean(ratio - 1 - ratio.log(), mask), rtol=1e-4)


def test_gradients_of_kl_estimators_used_as_losses():
    """By exact sums over three actions, with the sampling held still."""
    logits, other = jnp.array([0.3, -0.5, 0.9]), jax.nn.log_softmax(jnp.array([0.1, 0.7, -0.2]))

    def expected(estimator):
        def loss(logits):
            log_probs = jax.nn.log_softmax(logits)
            return (jnp.exp(jax.lax.stop_gradient(log_probs)) * estimator(log_probs, other)).sum()

        return jax.grad(loss)(logits)

    def kl(p, q):
        return (jnp.exp(p) * (p - q)).sum()

    forward = jax.grad(lambda x: kl(jax.nn.log_softmax(x), other))(logits)
    reverse = jax.grad(lambda x: kl(other, jax.nn.log_softmax(x)))(logits)
    assert_allclose(expected(losses.kl_k1), jnp.zeros(3), atol=1e-6)
    assert_allclose(expected(losses.kl_k2), forward, rtol=1e-5)
    assert_allclose(expected(losses.kl_k3), reverse, rtol=1e-5)


LOSSES = {
    "ppo": lambda x, y, mask, **named: losses.ppo_clip_loss(x, jnp.array(OLD), y, 0.2, mask, **named)[0],
    "value": lambda x, y, mask, **named: losses.value_loss(x, y, mask=mask, **named),
    "clipped value": lambda x, y, mask, **named: losses.value_loss(x, y, y + 0.3, 0.2, mask, **named),
    "k1": lambda x, y, mask, **named: losses.masked_mean(losses.kl_k1(x, y, mask), mask, **named),
    "k2": lambda x, y, mask, **named: losses.masked_mean(losses.kl_k2(x, y, mask), mask, **named),
    "k3": lambda x, y, mask, **named: losses.masked_mean(losses.kl_k3(x, y, mask), mask, **named),
    "entropy": lambda x, y, mask, **named: losses.masked_mean(
        losses.categorical_entropy(jnp.stack([x, y], -1), mask), mask, **named
    ),
}


@pytest.mark.parametrize("odd", [500.0, -np.inf, np.nan])
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_masked_may_hold_anything(name, odd):
    """Padding has log-probabilities that overflow; neither a loss nor its gradient may see them."""
    loss, mask = LOSSES[name], jnp.array(MASK)
    value, (gradient, other) = jax.value_and_grad(loss, (0, 1))(
        jnp.where(mask, LOG_PROBS, odd), jnp.where(mask, ADVANTAGES, odd), mask
    )
    whole, tail = jnp.array(LOG_PROBS), jnp.array(ADVANTAGES)
    expected, (known, known_other) = jax.value_and_grad(loss, (0, 1))(whole, tail, mask)
    assert_allclose(value, expected, rtol=1e-6)
    assert_allclose(gradient, known, rtol=1e-6)
    assert_allclose(other, known_other, rtol=1e-6)
    assert not np.any(gradient[~MASK]) and np.any(gradient[MASK])


@pytest.mark.parametrize("name", LOSSES)
def test_parts_with_the_whole_count_add_up(name):
    """Microbatches of different numbers of tokens, as accumulation makes them: exact, with gradients."""
    loss, args = LOSSES[name], (jnp.array(LOG_PROBS), jnp.array(ADVANTAGES))
    ragged = jnp.arange(SHAPE[1]) < jnp.array([[5], [1], [2], [5], [0], [3]])
    whole, gradient = jax.value_and_grad(loss)(*args, ragged)
    parts = [
        jax.value_and_grad(loss)(*args, ragged & (jnp.arange(6)[:, None] // 2 == i), total=ragged.sum())
        for i in range(3)
    ]
    assert_allclose(sum(part for part, _ in parts), whole, rtol=1e-5)
    assert_allclose(sum(part for _, part in parts), gradient, rtol=1e-5, atol=1e-8)


def test_a_mask_of_numbers_is_refused():
    """It looks like weights, which a sum over what isn't 0 would take for 1."""
    with pytest.raises(TypeError, match="a mask says what counts and is boolean, this one is float32"):
        losses.where_counted(jnp.ones(3), jnp.ones(3))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_as_in_trl(clip, mask):
    loss, gradient = jax.value_and_grad(
        lambda values: losses.value_loss(
            values, jnp.array(RETURNS), jnp.array(OLD_VALUES), clip, as_jax(mask)
        )
    )(jnp.array(VALUES))
    values, old, returns = torch.tensor(VALUES, requires_grad=True), *map(torch.tensor, (OLD_VALUES, RETURNS))
    errors = (values - returns) ** 2
    if clip is not None:
        held = torch.clamp(values, old - clip, old + clip)
        errors = torch.max(errors, (held - returns) ** 2)
    theirs = 0.5 * torch_mean(errors, mask)
    theirs.backward()
    assert_allclose(loss, theirs.detach(), rtol=1e-5)
    assert_allclose(gradient, values.grad, rtol=1e-5, atol=1e-7)


def test_normalized_advantages():
    normal = np.asarray(losses.normalize_advantages(jnp.array(ADVANTAGES), jnp.array(MASK)))
    assert abs(normal[MASK].mean()) < 1e-6 and abs(normal[MASK].std() - 1) < 1e-5
    assert not normal[~MASK].any()
    # What doesn't count has no say in what does.
    other = jnp.where(MASK, ADVANTAGES, 1e6)
    assert_allclose(losses.normalize_advantages(other, jnp.array(MASK)), normal, rtol=1e-6)
    alone = losses.normalize_advantages(jnp.array(ADVANTAGES[MASK]))
    assert_allclose(alone, normal[MASK], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("reward", "size"), [(5.3, 8), (-80.4, 16), (1000.1, 7)])
def test_equal_advantages_are_none(reward, size):
    """As of a group whose answers are all as good: rounding of the mean is no signal."""
    equal = jnp.full(size, reward, jnp.float32)
    assert not losses.normalize_advantages(equal).any()
    some = jnp.arange(size) % 3 > 0
    assert not losses.normalize_advantages(jnp.where(some, equal, 1e6), some).any()


def test_groups_are_normalized_by_themselves():
    groups = jnp.array(ADVANTAGES)
    normal = jax.vmap(losses.normalize_advantages)(groups)
    theirs = (ADVANTAGES - ADVANTAGES.mean(1, keepdims=True)) / ADVANTAGES.std(1, keepdims=True)
    assert_allclose(normal, theirs, rtol=1e-4, atol=1e-6)


def test_nothing_counts():
    nothing, some = jnp.zeros(SHAPE, bool), jnp.array(ADVANTAGES)
    assert losses.masked_mean(some, nothing) == 0
    assert losses.ppo_clip_loss(some, some, some, 0.2, nothing)[0] == 0
    assert np.isfinite(losses.normalize_advantages(some, nothing)).all()


def test_kl_estimators():
    """Means over samples of p come to KL(p || q), k1 and k3 exactly, k2 nearly; k3 varies least."""
    p, q = (jnp.array([0.1, 0.6, 0.3]), jnp.array([0.12, 0.58, 0.3]))
    exact = float((p * jnp.log(p / q)).sum())
    at = jnp.log(p), jnp.log(q)
    k1, k2, k3 = (np.asarray(k(*at)) for k in (losses.kl_k1, losses.kl_k2, losses.kl_k3))
    p = np.asarray(p)
    assert_allclose((p * k1).sum(), exact, rtol=1e-5)
    assert_allclose((p * k3).sum(), exact, rtol=1e-4)
    assert_allclose((p * k2).sum(), exact, rtol=0.1)
    assert (k2 >= 0).all() and (k3 >= 0).all() and (k1 < 0).any()

    def deviation(k):
        return np.sqrt((p * (k - (p * k).sum()) ** 2).sum())

    assert deviation(k3) < deviation(k1)


def test_distributions_as_in_torch():
    logits = RNG.normal(size=(7, 4)).astype(np.float32)
    ours, theirs = (
        Categorical(jnp.asarray(logits)),
        torch.distributions.Categorical(logits=torch.tensor(logits)),
    )
    actions = np.arange(7) % 4
    assert_allclose(ours.log_prob(jnp.asarray(actions)), theirs.log_prob(torch.tensor(actions)), rtol=1e-5)
    assert_allclose(ours.entropy(), theirs.entropy(), rtol=1e-5)
    mean, log_std, action = RNG.normal(size=(3, 7, 2)).astype(np.float32)
    ours = Gaussian(jnp.asarray(mean), jnp.asarray(log_std))
    theirs = torch.distributions.Normal(torch.tensor(mean), torch.tensor(log_std).exp())
    assert_allclose(
        ours.log_prob(jnp.asarray(action)), theirs.log_prob(torch.tensor(action)).sum(-1), rtol=1e-4
    )
    assert_allclose(ours.entropy(), theirs.entropy().sum(-1), rtol=1e-5, atol=1e-6)
    samples = ours.sample(jax.random.key(0)), jax.vmap(ours.sample)(jax.random.split(jax.random.key(0), 4000))
    assert samples[0].shape == mean.shape
    assert_allclose(samples[1].mean(0), mean, atol=4 * np.exp(log_std).max() / np.sqrt(4000))


def test_entropy_of_what_cannot_be_chosen():
    """Logits of -inf, as a sampler's mask makes them: entropy and gradient stay numbers."""
    entropy, gradient = jax.value_and_grad(lambda x: losses.categorical_entropy(x).sum())(
        jnp.array([[0.0, 0.0, -jnp.inf]])
    )
    assert_allclose(entropy, np.log(2), rtol=1e-6)
    assert np.isfinite(gradient).all()
