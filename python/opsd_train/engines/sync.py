"""How a vLLM server gets the student's weights: by files, by NCCL, or as a new LoRA adapter.

All of it goes over routes of the stock server: `/collective_rpc`, `/update_weight_version` and the weight
transfer exist with `VLLM_SERVER_DEV_MODE=1`, those of adapters with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`.
CUDA IPC is left out: over HTTP vLLM pickles its handles.
"""

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from opsd_train.backbone import causal_lm
from opsd_train.engines.base import EngineError
from opsd_train.engines.client import ServerClient
from opsd_train.engines.exchange import StatusError
from opsd_train.engines.weights import weight_bytes, weights_of, whole

SHARD_BYTES = 4_000_000_000


class Sync:
    """Sends the weights of a student; every rank calls it, the first one talks to the server.

    Args:
        client: the server.
        student: the model in training.
        is_main: whether this is the first rank.
    """

    def __init__(self, client: ServerClient, student: torch.nn.Module, is_main: bool = True) -> None:
        self.client, self.student, self.is_main = client, student, is_main
        self.own_head = False  # the server keeps a tied head apart from the embedding
        self.size = weight_bytes(student)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is sent."""
        return with_head(self.student) if self.own_head else weights_of(self.student)

    def send(self, tag: str) -> None:
        """Send the weights as they are; the server calls them `tag` when it has all of them, not before."""
        if self.is_main:
            self.client.post("/update_weight_version", {"new_version": f"{tag}-incomplete"})
        self._transfer(tag)
        if self.is_main:
            found = self.client.post("/reset_prefix_cache")
            if not (found or {}).get("success"):
                raise EngineError(
                    f"vLLM server at {self.client.url}: did not reset its prefix cache: {found}"
                )
            self.client.post("/update_weight_version", {"new_version": tag})

    def _transfer(self, tag: str) -> None:
        raise NotImplementedError

    def model(self, served: str, tag: str) -> str:
        """What rollouts of that version ask for."""
        return served

    def close(self) -> None:
        """Remove what was only for the transfer."""


class DiskSync(Sync):
    """Safetensors in a folder that both see, then vLLM's `reload_weights` from there.

    Args:
        folder: of the transfer; each version is a folder in it for as long as it is read.
    """

    def __init__(
        self, client: ServerClient, student: torch.nn.Module, folder: Path, is_main: bool = True
    ) -> None:
        super().__init__(client, student, is_main)
        self.folder = folder

    def _transfer(self, tag: str) -> None:
        target = self.folder / tag
        write_weights(self.weights(), target, self.is_main)
        if not self.is_main:
            return
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(target.resolve())}}
        try:
            self.client.post("/collective_rpc", body, self.size)
        finally:
            shutil.rmtree(target)


class LoraSync(Sync):
    """The adapter of a PEFT student under a name of its own for each version; the one before is unloaded.

    Args:
        folder: where adapters are written; the server reads them from there.
    """

    def __init__(
        self, client: ServerClient, student: torch.nn.Module, folder: Path, is_main: bool = True
    ) -> None:
        super().__init__(client, student, is_main)
        if not isinstance(student, PeftModel):
            raise ValueError("vllm_sync: expected a student with LoRA adapters for 'lora'; got one without")
        config = student.peft_config[student.active_adapter]
        if not isinstance(config, LoraConfig) or config.use_dora or config.modules_to_save:
            raise ValueError("vllm_sync: expected plain LoRA for 'lora'; got DoRA, modules_to_save or others")
        self.peft, self.folder = student, folder
        self.last: str | None = None

    def _transfer(self, tag: str) -> None:
        name = self.peft.active_adapter
        state = get_peft_model_state_dict(self.peft, adapter_name=name)
        state = {key: whole(tensor).contiguous().cpu() for key, tensor in state.items()}
        if not self.is_main:
            return
        self._unload(tag)  # sent before, with other weights, in the same step
        partial, target = self.folder / f"{tag}.partial", self.folder / tag
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(state, partial / "adapter_model.safetensors")
        self.peft.peft_config[name].save_pretrained(str(partial))
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        size = sum(tensor.nbytes for tensor in state.values())
        body = {"lora_name": tag, "lora_path": str(target.resolve())}
        self.client.post("/v1/load_lora_adapter", body, size)
        if self.last is not None and self.last != tag:
            self._unload(self.last)
        self.last = tag

    def _unload(self, tag: str) -> None:
        """Forget an adapter if the server has it."""
        try:
            self.client.post("/v1/unload_lora_adapter", {"lora_name": tag})
        except StatusError as error:
            if error.status not in (400, 404):
                raise
        if tag == self.last:
            shutil.rmtree(self.folder / tag, ignore_errors=True)

    def model(self, served: str, tag: str) -> str:
        """The adapter."""
        return tag

    def close(self) -> None:
        """Unload the last adapter; a server that is gone has none."""
        if self.is_main and self.last is not None:
            try:
                self._unload(self.last)
            except EngineError:
                shutil.rmtree(self.folder / self.last, ignore_errors=True)
            self.last = None


def with_head(student: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights_of`, and a tied head once more under a name of its own."""
    model = causal_lm(student)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    for name, tensor in weights_of(student):
        yield name, tensor
        if name == f"{names[embedding]}.weight" and head.weight is embedding.weight:
            yield f"{names[head]}.weight", tensor.clone()


def is_tied(student: torch.nn.Module) -> bool:
    """Whether head and embedding are one weight."""
    model = causal_lm(student)
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def write_checkpoint(
    student: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, target: Path, is_main: bool = True
) -> None:
    """A folder that a server can start from, adapters merged, a tied head kept apart.

    vLLM on a CPU repacks a tied head when it starts and never again, whatever it is sent later.
    """
    write_weights(with_head(student), target, is_main)
    if is_main:
        config = copy.deepcopy(causal_lm(student).config)
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        config.save_pretrained(target)
        tokenizer.save_pretrained(target)


def write_weights(weights: Iterator[tuple[str, torch.Tensor]], target: Path, is_main: bool = True) -> None:
    """Safetensors files of at most `SHARD_BYTES` or one tensor; the folder is there when all of them are.

    Other ranks than the first only take part in gathering weights that are sharded.
    """
    if not is_main:
        for _ in weights:
            pass
        return
    partial = target.with_name(f"{target.name}.partial")
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    size = count = 0
    for name, tensor in weights:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            save_file(shard, partial / f"model-{count:05d}.safetensors", metadata={"format": "pt"})
            shard, size, count = {}, 0, count + 1
        shard[name] = tensor.detach().contiguous().cpu()
        size += tensor.nbytes
    name = f"model-{count:05d}.safetensors" if count else "model.safetensors"
    save_file(shard, partial / name, metadata={"format": "pt"})
    os.rename(partial, target)
