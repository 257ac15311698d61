"""An OpenAI-compatible server for a model of ours: FastAPI before `llm.engine`.

`running` serves from a thread of this process. It needs the `serve` extra.
"""

from launch.server.limits import Limits
from launch.server.run import check_installed, running

__all__ = ["Limits", "check_installed", "running"]
