"""The part of a run's configuration that concerns rollouts by a vLLM server."""

from dataclasses import dataclass

from opsd_train.engines.patience import Patience
from opsd_train.engines.server_args import ServerArguments
from opsd_train.fields import option
from opsd_train.redaction import redact

SYNCS = ("disk", "nccl", "lora")


@dataclass
class ServerConfig:
    """Options of `--rollouts vllm-server`."""

    vllm_url: str = option("http://127.0.0.1:8000", "Where the vLLM server of `vllm-server` listens.")
    vllm_start: bool = option(
        False, "Start the vLLM server at vllm_url, on this machine, with the student; it ends with the run."
    )
    vllm_server_args: str = option(
        "", 'Further arguments of the server that vllm_start starts, say "--dtype float32 --enforce-eager".'
    )
    vllm_public: bool = option(
        False,
        "Let vllm_server_args open the server that vllm_start starts, with `--host`, to other machines: it "
        "obeys whoever reaches it, and needs an `--api-key` then.",
    )
    vllm_python: str | None = option(
        None, "The interpreter of the server that vllm_start starts, with vLLM installed; None is this one."
    )
    vllm_sync: str = option(
        "disk",
        "How a vLLM server gets the weights: `disk` (safetensors in vllm_sync_dir, works on any device), "
        "`nccl` (vLLM's own transfer between GPUs) or `lora` (a new adapter for each version).",
    )
    vllm_sync_dir: str | None = option(
        None,
        "Folder that run and server see under the same path, say in /dev/shm on one machine; None is "
        "vllm-sync in output_dir.",
    )
    vllm_call_seconds: float | None = option(
        None,
        "Every transfer of weights, and every single rollout of a server, takes no longer than "
        "this. None is 27 s and a second per 100 MB for a transfer, 600 s for a rollout.",
    )
    vllm_concurrency: int = option(256, "Requests that a vLLM server has at once.")
    vllm_checksums: bool = option(
        True, "Compare checksums of weights with the server's after every transfer, bit by bit."
    )
    vllm_master: str = option(
        "127.0.0.1:51216", "Address and port of this machine where the server's GPUs meet it, with `nccl`."
    )

    def check_server(self) -> None:
        """ValueError for an option that is out of range."""
        if self.vllm_sync not in SYNCS:
            raise ValueError(f"vllm_sync: expected one of {', '.join(SYNCS)}; got {self.vllm_sync!r}")
        if self.vllm_call_seconds is not None and not self.vllm_call_seconds > 0:
            raise ValueError(
                f"vllm_call_seconds: expected a number of seconds above 0, got {self.vllm_call_seconds}"
            )
        if self.vllm_concurrency < 1:
            raise ValueError(f"vllm_concurrency: expected at least 1, got {self.vllm_concurrency}")
        if self.vllm_server_args and not self.vllm_start:
            raise ValueError(
                "vllm_server_args: expected nothing without vllm_start, since the server at vllm_url runs "
                f"already; got {redact(self.vllm_server_args)!r}"
            )
        self.server_arguments.check(self.vllm_public)
        host, _, port = self.vllm_master.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"vllm_master: expected host:port, got {self.vllm_master!r}")

    @property
    def server_arguments(self) -> ServerArguments:
        """Those of `vllm_server_args`."""
        return ServerArguments.of(self.vllm_server_args)

    @property
    def patience(self) -> Patience:
        """When a call to an engine is given up."""
        return Patience(getattr(self, "rollout_stall_seconds", 30.0), self.vllm_call_seconds)
