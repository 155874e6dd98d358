"""The part of a run's configuration that concerns who writes the rollouts."""

from dataclasses import dataclass

from opsd_train.engines.server_config import ServerConfig
from opsd_train.method_config import option

ENGINES = ("hf", "vllm", "vllm-server")


@dataclass
class EngineConfig(ServerConfig):
    """Options of the engine that writes rollouts."""

    rollouts: str = option(
        "hf",
        "Who writes rollouts: `hf` (transformers' generate), `vllm` (in this process) or `vllm-server`.",
    )

    def check_engine(self) -> None:
        """ValueError for an option that is out of range, or that the engine chosen does not have."""
        if self.rollouts not in ENGINES:
            raise ValueError(f"rollouts: expected one of {', '.join(ENGINES)}; got {self.rollouts!r}")
        self.check_server()
