"""One reinforcement learning experiment: everything `python -m rl.train` reads. Reading it needs no JAX."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.config import config
from core.options import MeshConfig, RunConfig
from rl.options import DDPGConfig, DQNConfig, QLearningConfig, Sizes

ALGORITHMS = ("ppo", "dqn", "ddpg", "q_learning")


@config
class EnvConfig:
    """Which environment, and what is normalized on its way to the learner.

    Statistics run while training and stand still at evaluation, which counts the environment's own rewards.
    """

    name: str  # gymnax's or ours, see `rl.envs.wrapper.names`
    normalize_observation: bool = False
    normalize_reward: bool = False


@config
class PPOConfig:
    """Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347).

    An update collects `rollout` steps in each of `environments`, and goes `epochs` times over them in
    `minibatches`.
    """

    environments: int = Field(ge=1)
    rollout: int = Field(ge=1)
    epochs: int = Field(4, ge=1)
    minibatches: int = Field(4, ge=1)
    learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False)  # at first, and linearly to zero
    gamma: float = Field(0.99, ge=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.2, gt=0, allow_inf_nan=False)
    value_weight: float = Field(0.5, ge=0, allow_inf_nan=False)
    entropy_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    clip_norm: float = Field(0.5, gt=0, allow_inf_nan=False)
    hidden: Sizes = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"

    @property
    def steps_per_update(self) -> int:
        """Environment steps, over all environments, in one update."""
        return self.environments * self.rollout

    @property
    def divided(self) -> dict[str, int]:
        """What devices share if they don't share seeds."""
        steps = self.steps_per_update // self.minibatches
        return {"environments": self.environments, "environments x rollout / minibatches": steps}

    @model_validator(mode="after")
    def _check(self):
        if self.steps_per_update % self.minibatches:
            raise ValueError(
                f"environments x rollout ({self.environments} x {self.rollout} = {self.steps_per_update}) "
                f"is not a multiple of minibatches ({self.minibatches})"
            )
        if self.steps_per_update == self.minibatches:
            raise ValueError(
                f"minibatches ({self.minibatches}) leaves one step in each, whose advantage is normalized to "
                f"nothing: choose fewer"
            )
        return self


@config
class TrainConfig:
    """How long, and how often: `seeds` runs at once, of `seed`, `seed` + 1, and so on."""

    steps: int = Field(ge=1, lt=2**31)  # environment steps of each seed
    seeds: int = Field(1, ge=1)


@config
class EvalConfig:
    """Greedy episodes in fresh environments, each `every` environment steps and at the end."""

    every: int = Field(0, ge=0)  # 0: at the end only
    episodes: int = Field(100, ge=1)  # of each seed


@config
class CheckpointConfig:
    """How often a run saves itself, in environment steps, and how many checkpoints it keeps."""

    every: int = Field(0, ge=0)  # 0: at the end only
    keep: int = Field(2, ge=1)


@config
class Experiment:
    """The whole configuration of a run: one environment and one algorithm."""

    run: RunConfig
    env: EnvConfig
    train: TrainConfig
    ppo: PPOConfig | None = None
    dqn: DQNConfig | None = None
    ddpg: DDPGConfig | None = None
    q_learning: QLearningConfig | None = None
    seed: int = Field(0, ge=0, lt=2**31)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)

    @property
    def algorithm(self) -> str:
        """The name of the one section that is given."""
        return next(name for name in ALGORITHMS if getattr(self, name) is not None)

    @property
    def steps_per_update(self) -> int:
        return getattr(self, self.algorithm).steps_per_update

    @property
    def updates(self) -> int:
        """How many updates the whole run is."""
        return self.train.steps // self.steps_per_update

    @model_validator(mode="after")
    def _check(self):
        given = [name for name in ALGORITHMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"the algorithm is the one section of {', '.join(ALGORITHMS)} that is given, and here "
                f"{' and '.join(given) or 'none'} is"
            )
        each = self.steps_per_update
        intervals = {
            "train.steps": self.train.steps,
            "eval.every": self.eval.every,
            "checkpoint.every": self.checkpoint.every,
        }
        for key, steps in intervals.items():
            if steps % each:
                near = sorted({max(1, steps // each) * each, -(-steps // each) * each})
                raise ValueError(
                    f"{key} ({steps}) is not a multiple of the {each} environment steps of an update "
                    f"({self.algorithm}): for example {' or '.join(map(str, near))}"
                )
        options = self.dqn or self.ddpg
        if options is not None:
            intervals["learning_starts"] = options.learning_starts
        if self.dqn is not None:
            intervals["target_every"] = self.dqn.target_every
        for key, steps in intervals.items():
            if steps > self.train.steps:
                raise ValueError(f"{key} ({steps}) is never reached in train.steps ({self.train.steps})")
        for axis in ("fsdp", "tensor", "context", "expert"):
            size = getattr(self.mesh, axis)
            if size != 1:
                raise ValueError(f"mesh.{axis} is {size}: seeds and environments divide over mesh.data alone")
        if self.seed + self.train.seeds > 2**31:
            raise ValueError(f"seed ({self.seed}) leaves no room for {self.train.seeds} seeds below 2**31")
        return self
