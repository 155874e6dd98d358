"""Which configurations of DeepSpeed a run can have, and which a checkpoint can hold."""

from typing import Any

# Settings of DeepSpeed, and their values with which all of a run's state is known here.
KEPT: dict[str, tuple[Any, ...]] = {
    "fp16.enabled": (None, False, "auto"),  # the scale of the loss is state of DeepSpeed's own
    "zero_optimization.offload_optimizer.device": (None, "none", "cpu"),
    "zero_optimization.offload_optimizer.ratio": (None, 1),  # a second optimizer has the rest
    "zero_optimization.offload_param.device": (None, "none", "cpu"),
    "zero_optimization.zenflow": (None,),
}


def check_options(plugin: Any, saves: bool) -> None:
    """ValueError for a configuration that the driver cannot train under.

    Args:
        plugin: DeepSpeed's, of accelerate.
        saves: whether checkpoints are to be written.
    """
    stage = plugin.hf_ds_config.get_value("zero_optimization.stage")
    if stage != 3:
        raise ValueError(f"deepspeed: expected zero_optimization.stage 3, got {stage!r}")
    if saves and (name := not_kept(plugin)) is not None:
        got = plugin.hf_ds_config.get_value(name)
        raise ValueError(
            f"save_strategy: expected 'no' with DeepSpeed's {name} {got!r}, whose state no checkpoint holds"
        )


def not_kept(plugin: Any) -> str | None:
    """A setting of DeepSpeed under which a run has state that no checkpoint holds; None without one."""
    get = plugin.hf_ds_config.get_value
    return next((name for name, known in KEPT.items() if get(name) not in known), None)
