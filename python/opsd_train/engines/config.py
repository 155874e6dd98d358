"""The part of a run's configuration that concerns who writes the rollouts."""

from dataclasses import dataclass

from opsd_train.engines.server_config import ServerConfig
from opsd_train.engines.table import ENGINES
from opsd_train.fields import option

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EngineConfig(ServerConfig):
    """Options of the engine that writes rollouts."""

    rollouts: str = option(
        "hf",
        "Who writes rollouts: " + ", ".join(f"`{name}` ({one.about})" for name, one in ENGINES.items()) + ".",
    )
    rollout_stall_seconds: float = option(
        30.0,
        "The run ends if the engine makes no progress for so long: no step, no weight taken over.",
    )
    rollout_start_seconds: float = option(
        600.0, "The run ends if the engine has not started after this long."
    )
    vllm_dtype: str = option(
        "auto",
        "What vLLM computes in: `auto` (as the student's weights), `float32`, `bfloat16` or `float16`.",
    )
    vllm_gpu_memory_utilization: float = option(
        0.3, "Share of the GPU's memory that vLLM in this process takes, weights and cache together."
    )
    vllm_kv_cache_gb: float | None = option(
        None,
        "Size of vLLM's cache in GiB, in place of the share; None is 1 on a CPU, where there is no share.",
    )
    vllm_enforce_eager: bool = option(
        False, "Run vLLM without CUDA graphs: a faster start, slower rollouts. Always so on a CPU."
    )
    vllm_sleep_level: int = option(
        1,
        "What vLLM's memory on a GPU is between rollouts: 0 kept, 1 weights in host memory and no cache, 2 "
        "neither (weights are sent again).",
    )

    def check_engine(self) -> None:
        """ValueError for an option that is out of range, or that the engine chosen does not have."""
        if self.rollouts not in ENGINES:
            raise ValueError(f"rollouts: expected one of {', '.join(ENGINES)}; got {self.rollouts!r}")
        if self.vllm_dtype not in DTYPES:
            raise ValueError(f"vllm_dtype: expected one of {', '.join(DTYPES)}; got {self.vllm_dtype!r}")
        if self.vllm_sleep_level not in (0, 1, 2):
            raise ValueError(f"vllm_sleep_level: expected 0, 1 or 2; got {self.vllm_sleep_level}")
        if not 0 < self.vllm_gpu_memory_utilization < 1:
            raise ValueError(
                "vllm_gpu_memory_utilization: expected a number above 0 and below 1, got "
                f"{self.vllm_gpu_memory_utilization}"
            )
        for name in ("rollout_stall_seconds", "rollout_start_seconds", "vllm_kv_cache_gb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        self.check_server()
