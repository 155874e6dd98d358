"""The student's weights under the names and shapes of its checkpoint: what an engine is sent after a step."""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from opsd_train.backbone import causal_lm
from opsd_train.sharding import gathered
from opsd_train.teachers.effective import with_deltas

Named = tuple[str, torch.Tensor]
ELEMENTS_AT_ONCE = 1 << 20  # of a checksum


@torch.no_grad()
def weights_of(student: torch.nn.Module) -> Iterator[Named]:
    """Every weight as `save_pretrained` would name and shape it, one layer after the other.

    LoRA adapters are merged on the fly, W + s B A, and the model in training stays as it is. A tied head is
    named once. A sharded weight is gathered: where the model has several processes, all of them have to
    iterate to the end, and each gets all weights. The tensors may share memory with the model's.

    Args:
        student: a causal language model, or a PEFT model of one.

    Raises:
        ValueError: adapters that are not plain LoRA, or a tied head that is no longer tied.
    """
    model = causal_lm(student)
    ignored = set(model._keys_to_ignore_on_save or ())
    _require_tied(model)
    named = ((name, tensor) for name, tensor in _tensors(model) if name not in ignored)
    # Some checkpoints hold another layout than the model (experts apart, say), but never across layers.
    for _, layer in itertools.groupby(named, key=lambda pair: _layer(pair[0])):
        yield from revert_weight_conversion(model, dict(layer)).items()


class Sent:
    """Weights on their way: each is a sign of life, and it is known whether the last was asked for."""

    def __init__(self, weights: Iterable[Named], beat: Callable[[], None]) -> None:
        self.count, self.over = 0, False
        self._weights, self._beat = weights, beat

    def __iter__(self) -> Iterator[Named]:
        for named in self._weights:
            self._beat()
            self.count += 1
            yield named
        self.over = True


def tied_head(model: PreTrainedModel) -> str | None:
    """Name of the head's weight if it is the embedding's, which `weights_of` therefore leaves out."""
    if not model.config.get_text_config().tie_word_embeddings:
        return None
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def weight_bytes(student: torch.nn.Module) -> int:
    """Bytes of all weights on all ranks, adapters counted beside what they are merged into."""
    return sum(
        getattr(one, "ds_numel", one.numel()) * one.element_size() for one in causal_lm(student).parameters()
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a weight, without its gradient; a collective of its processes if they share it."""
    if hasattr(tensor, "ds_id"):  # whole within `gathered` only
        return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def checksum(weights: Iterable[Named]) -> str:
    """A hash of names, types, shapes and every bit; the same in any order and on any device.

    The bits are summed as integers, each times a number of its own: exact where sums of floats are not.
    """
    lines = sorted(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_bits(tensor)}" for name, tensor in weights)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _bits(tensor: torch.Tensor) -> int:
    """The sum of the bytes, each times an odd number that depends on its place, modulo 2^64."""
    values = tensor.detach().contiguous().flatten().view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, values.numel(), ELEMENTS_AT_ONCE):
        part = values[start : start + ELEMENTS_AT_ONCE].long()
        place = torch.arange(start, start + part.numel(), device=values.device)
        total += (part * (place * 2_654_435_761 * 2 + 1)).sum()
    return int(total)


def _layer(name: str) -> str:
    """What comes up to the first number in a name: one for each layer."""
    found = re.match(r".*?\.\d+\.", name)
    return found.group() if found else name


def _tensors(model: torch.nn.Module) -> Iterator[Named]:
    """Weights and saved buffers by their names in the model without adapters, tied ones under the first."""
    seen: set[torch.Tensor] = set()
    for name, module in _modules(model, ""):
        own = itertools.chain(
            module.named_parameters(recurse=False, remove_duplicate=False),
            (
                (key, buffer)
                for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
                if key not in module._non_persistent_buffers_set
            ),
        )
        adapted = isinstance(module, LoraLayer)
        with gathered(module.parameters(recurse=adapted)):
            for key, tensor in _merged(module, name) if adapted else own:  # type: ignore[arg-type]
                if tensor not in seen:
                    seen.add(tensor)
                    yield f"{name}{key}", whole(tensor)


def _modules(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every module with its name and a dot; what PEFT put around one counts as that one."""
    if isinstance(module, ModulesToSaveWrapper):
        saved = [
            module.modules_to_save[name] for name in module.active_adapters if name in module.modules_to_save
        ]
        yield from _modules(saved[0] if saved else module.original_module, prefix)
        return
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not (
        isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and not module.lora_variant
    ):
        raise ValueError(
            "rollouts: expected plain LoRA adapters for an engine that is sent the weights, got "
            f"{type(module).__name__} at {prefix.rstrip('.')}; use rollouts 'hf'"
        )
    yield prefix, module
    if not isinstance(module, LoraLayer):
        for name, child in module.named_children():
            yield from _modules(child, f"{prefix}{name}.")


def _merged(layer: LoraLayer, name: str) -> Iterator[Named]:
    """The parameters of a layer with its active adapters added."""
    for key, parameter in layer.get_base_layer().named_parameters():
        adapters = [] if layer.disable_adapters else [a for a in layer.active_adapters if a in layer.scaling]
        adapters = [adapter for adapter in adapters if adapter not in layer.merged_adapters]
        if key == "weight" and adapters:
            deltas = (whole(layer.get_delta_weight(adapter)) for adapter in adapters)  # type: ignore[attr-defined]
            yield key, with_deltas(whole(parameter), deltas).to(parameter.dtype)
        elif key == "bias" and any(layer.lora_bias.get(adapter) for adapter in adapters):
            raise ValueError(
                f"rollouts: expected LoRA without a bias of its own, got lora_bias at {name[:-1]}"
            )
        else:
            yield key, parameter


def _require_tied(model: PreTrainedModel) -> None:
    """A head that the configuration calls tied is not loaded by anyone: it has to be the embedding."""
    if not model.config.get_text_config().tie_word_embeddings:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        isinstance(embedding, BaseTunerLayer | AuxiliaryTrainingWrapper)
        or head.weight is not embedding.weight
    ):
        raise ValueError(
            "model: expected a tied head to share the embedding's weight, but one of them has weights of its "
            "own; leave embed_tokens and lm_head out of target_modules and modules_to_save"
        )
