"""The sections of the algorithms that learn the values of actions. Reading them needs no JAX."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.config import config

Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]  # of hidden layers


@config
class CollectConfig:
    """What the algorithms of this file have in common: so many steps with one policy, then learning."""

    environments: int = Field(ge=1)
    train_every: int = Field(ge=1)  # environment steps, over all environments, in one update

    @property
    def steps_per_update(self) -> int:
        return self.train_every

    @property
    def divided(self) -> dict[str, int]:
        """What devices share if they don't share seeds."""
        return {"environments": self.environments}

    @model_validator(mode="after")
    def _check_train_every(self):
        if self.train_every % self.environments:
            near = -(-self.train_every // self.environments) * self.environments
            raise ValueError(
                f"train_every ({self.train_every}) is not a multiple of environments ({self.environments}), "
                f"which step together: for example {near}"
            )
        return self


@config
class ReplayConfig(CollectConfig):
    """What is learned from a replay: an update takes `gradient_steps` steps, each on a batch of its own."""

    gradient_steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    learning_starts: int = Field(1000, ge=0)  # after so many environment steps
    replay_size: int = Field(100_000, ge=1, le=100_000_000)
    gamma: float = Field(0.99, ge=0, le=1)
    hidden: Sizes = (128, 128)

    @property
    def divided(self) -> dict[str, int]:
        return {"environments": self.environments, "batch_size": self.batch_size}

    @model_validator(mode="after")
    def _check_replay(self):
        if self.replay_size < max(self.train_every, self.batch_size):
            raise ValueError(
                f"replay_size ({self.replay_size}) is smaller than what comes in at once (train_every, "
                f"{self.train_every}) or goes out (batch_size, {self.batch_size})"
            )
        return self


@config
class QLearningConfig(CollectConfig):
    """Tabular Q-learning (Watkins 1989). The n-th visit to a pair moves its value by n^-`decay` of the error.

    A `decay` in (0.5, 1] converges to the optimal values whatever is random (Even-Dar & Mansour 2003).
    """

    gamma: float = Field(0.99, ge=0, le=1)
    decay: float = Field(0.7, ge=0, le=1)
    epsilon_final: float = Field(0.1, ge=0, le=1)
    epsilon_fraction: float = Field(0.5, gt=0, le=1)  # of the run in which epsilon falls from 1


@config
class PrioritizedConfig:
    """Prioritized replay (Schaul et al. 2015): exponents of the priorities and of the importance weights."""

    alpha: float = Field(0.6, ge=0, le=1)
    beta: float = Field(0.4, ge=0, le=1)  # at the start; 1 at the end of the run


@config
class DQNConfig(ReplayConfig):
    """Deep Q-learning (Mnih et al. 2015) with double, dueling and prioritized replay as options.

    All intervals are environment steps, over all environments.
    """

    target_every: int = Field(ge=1)
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    anneal: bool = False  # the learning rate, linearly to zero
    epsilon_final: float = Field(0.05, ge=0, le=1)
    epsilon_fraction: float = Field(0.2, gt=0, le=1)  # of the run in which epsilon falls from 1
    # Steps that an exploring action is held on average, then epsilon is that of beginning to explore; where
    # single steps lead nowhere (Dabney et al. 2020, arXiv:2006.01782, whose durations have heavier tails).
    epsilon_hold: float = Field(1.0, ge=1, allow_inf_nan=False)
    clip_norm: float = Field(10.0, gt=0, allow_inf_nan=False)
    double: bool = True
    dueling: bool = False
    prioritized: PrioritizedConfig | None = None

    @model_validator(mode="after")
    def _check_target_every(self):
        if self.target_every % self.train_every:
            raise ValueError(
                f"target_every ({self.target_every}) is not a multiple of train_every ({self.train_every}), "
                "after which the target network can be renewed"
            )
        return self


@config
class DDPGConfig(ReplayConfig):
    """Deep deterministic policy gradient (Lillicrap et al. 2015).

    Intervals as for DQN. Until learning starts, actions are noise alone: uniform with `gaussian` noise, the
    process itself with `ornstein_uhlenbeck`. `noise_scale` is in units of the actions' range [-1, 1], for
    the process its diffusion (with theta 0.15 and steps of 0.01, as usual: 1.8 times that when settled).
    """

    batch_size: int = Field(128, ge=1)
    actor_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    critic_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    tau: float = Field(0.005, gt=0, le=1)
    noise: Literal["gaussian", "ornstein_uhlenbeck"] = "gaussian"
    noise_scale: float = Field(0.1, ge=0, allow_inf_nan=False)
