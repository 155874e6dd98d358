"""A model's weights as they act: those of a LoRA model are W + s B A."""

import copy
from collections.abc import Iterable, Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from opsd_train.backbone import causal_lm
from opsd_train.sharding import gathered


def frozen_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that is never trained; a LoRA model's adapters are merged into its weights."""
    twin = copy.deepcopy(model)
    if isinstance(twin, PeftModel):
        twin = twin.merge_and_unload()
    return twin.eval().requires_grad_(False)


def effective_weights(student: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight that training moves, with its name in the model without adapters.

    Those with adapters are in fp32 at least, see `with_deltas`. Under FSDP2 they are sharded like the
    model's. Under ZeRO-3 each is whole until the next one is asked for.
    """
    if not isinstance(student, PeftModel):
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                with gathered([parameter]):
                    yield name, parameter.data
        return
    for name, module in causal_lm(student).named_modules():
        if isinstance(module, LoraLayer):
            if any(module.use_dora.values()):
                raise ValueError(
                    "teacher: expected one that copies no weights for a model with DoRA, say 'live'"
                )
            with gathered(module.parameters()):  # type: ignore[attr-defined]
                weight: torch.Tensor = module.get_base_layer().weight.data  # type: ignore[assignment]
                yield f"{name}.weight", with_deltas(weight, _deltas(module))


def with_deltas(weight: torch.Tensor, deltas: Iterable[torch.Tensor]) -> torch.Tensor:
    """W + s B A in fp32 at least.

    In bf16 it would mostly be W again: what an adapter adds is smaller than half a unit in W's last place.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    for delta in deltas:
        total = total + delta.to(wide)
    return total


def _deltas(layer: LoraLayer) -> Iterator[torch.Tensor]:
    """What each active adapter adds to the layer's weight."""
    for adapter in layer.active_adapters:
        if adapter in layer.scaling:
            yield layer.get_delta_weight(adapter)  # type: ignore[attr-defined]


@torch.no_grad()
def adapters_add(student: PeftModel) -> bool:
    """Whether the adapters change any weight, as fresh ones do not."""
    layers = (module for module in student.modules() if isinstance(module, LoraLayer))
    return any(bool(delta.any()) for layer in layers for delta in _deltas(layer))


def require_lora_alone(kind: str, student: PeftModel) -> None:
    """Adapters off are not the initial weights, nor merged ones the average, if anything else is trained."""
    of_lora = {
        parameter
        for module in student.modules()
        if isinstance(module, LoraLayer)
        for name, part in module.named_children()
        if name != "base_layer"
        for parameter in part.parameters()
    }
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter not in of_lora:
            raise ValueError(
                f"teacher: expected a PEFT model that trains LoRA adapters alone, for {kind!r}; it trains "
                f"{name} too; freeze it, or use teacher 'live'"
            )
