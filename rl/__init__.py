"""Reinforcement learning on vectorized environments. `returns` and `losses` know nothing of environments."""
