"""vLLM's native weight transfer between the GPUs of the trainer and those of a server.

The trainer needs the vllm package too, for its side of the transfer.
"""

import threading
from collections.abc import Iterator
from typing import Any

import torch

from opsd_train.engines.base import EngineError
from opsd_train.engines.client import ServerClient
from opsd_train.engines.sync import Sync


class NcclSync(Sync):
    """One broadcast of all weights from the first rank to the server's workers.

    The first time both sides have to meet before, and are given the time of a transfer for it.

    Args:
        address: host and port of this machine where they meet.
    """

    def __init__(
        self,
        client: ServerClient,
        student: torch.nn.Module,
        address: tuple[str, int],
        is_main: bool = True,
    ) -> None:
        super().__init__(client, student, is_main)
        self.address = address
        self.trainer: Any = None

    def _transfer(self, tag: str) -> None:
        """A broadcast cannot be told to stop, so it has a thread of its own that ends with the process."""
        failed: list[BaseException] = []
        seconds = self.client.patience.moving(self.size) * (2 if self.trainer is None else 1)

        def send() -> None:
            try:
                if self.trainer is None:
                    self.trainer = self._meet()
                self.trainer.send_weights()
            except BaseException as error:
                failed.append(error)

        if self.is_main:
            self.client.post("/pause?mode=wait")
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive() or failed:
            what = f"{failed[0]}" if failed else f"not done after {seconds:.0f} s"
            raise EngineError(
                f"vLLM server at {self.client.url}: the NCCL transfer of weights failed: {what}"
            )
        if self.is_main:
            self.client.post("/resume")

    def _meet(self) -> Any:
        """The trainer's side, connected to the server's."""
        try:
            from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise ValueError(f"vllm_sync: expected the vllm package here too, for 'nccl'; {error}") from None
        weights = self.weights

        class Source(WeightSource):
            """The student's weights as a checkpoint names them."""

            def __init__(self) -> None:
                self.known = [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in weights()]

            def metadata(self) -> list[ParamMeta]:
                return self.known

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return weights()

        workers = self.client.get("/get_world_size")["world_size"] if self.is_main else 0
        host, port = self.address
        info = NCCLTrainerInitInfo(host, port, 1 + workers, rank=0 if self.is_main else 1)
        return WeightTransferTrainerFactory.trainer_init(
            info, client=Routes(self.client, self.size), source=Source()
        )


class Routes:
    """The routes of the transfer, as vLLM's trainer side calls them.

    Args:
        client: the server.
        size: bytes of a transfer, which each of them may have to wait for.
    """

    def __init__(self, client: ServerClient, size: int) -> None:
        self.client, self.size = client, size

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have the workers join."""
        self.client.post("/init_weight_transfer_engine", {"init_info": init_info}, self.size)

    def start_weight_update(self) -> None:
        """Have them make room."""
        self.client.post("/start_weight_update", None, self.size)

    def update_weights(self, update_info: Any) -> None:
        """Have them receive."""
        self.client.post("/update_weights", {"update_info": update_info}, self.size)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have them put the weights to use."""
        body = None if weight_version is None else {"weight_version": weight_version}
        self.client.post("/finish_weight_update", body, self.size)
