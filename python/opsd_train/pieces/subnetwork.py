"""Training a sub-network only: the parameters that an earlier run moved most (arXiv 2606.13657).

On-policy distillation changes few coordinates; those that it changed, found by comparing two checkpoints, are
trained alone, and the rest keeps its values exactly. For that the optimizer must have no weight decay: it
moves parameters without a gradient too.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor


def moved_most(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Bool masks of the `share` of all entries that moved most, over all tensors together.

    The bound is the k-th largest |after - before| in fp32, k = share times the number of entries, rounded,
    at least 1. Entries as large as the bound all count, those that did not move never do.

    Raises ValueError unless both have tensors of the same names and shapes, or nothing moved.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0, at most 1; got {share}")
    if {name: one.shape for name, one in before.items()} != {name: one.shape for name, one in after.items()}:
        different = sorted(before.keys() ^ after.keys()) or [
            n for n in before if before[n].shape != after[n].shape
        ]
        raise ValueError(
            f"after: expected the tensors of `before`; they differ in {', '.join(different[:3])}"
        )
    count = sum(one.numel() for one in before.values())
    bound = _kth_largest(before, after, max(1, round(share * count)))
    if bound == 0 and not any(bool(_moved(before, after, name).any()) for name in before):
        raise ValueError("after: expected weights that differ from `before`; all are equal")
    masks = {}
    for name in before:
        distance = _moved(before, after, name)
        masks[name] = (distance >= bound) & (distance > 0)
    return masks


def from_checkpoints(
    before: str | os.PathLike[str], after: str | os.PathLike[str], share: float
) -> dict[str, Tensor]:
    """`moved_most` of the safetensors in two folders, as `save_pretrained` writes them."""
    return moved_most(_weights(before), _weights(after), share)


def restrict_to_moved(model: torch.nn.Module, folder: str | os.PathLike[str], share: float) -> None:
    """Train only the share of a model's weights that moved most from it to those in a run or model folder.

    Call it before training moves the model and before its optimizer is made; a run that is resumed finds the
    same masks, since it begins with the same model.

    Raises ValueError naming the option for a model with adapters, and for a folder of other weights.
    """
    if isinstance(model, PeftModel):
        raise ValueError("subnetwork: expected a model without adapters; got a PEFT model")
    final = Path(folder) / "model"
    try:
        after = _weights(final if final.is_dir() else folder)
        masks = moved_most({name: one.detach().cpu() for name, one in model.named_parameters()}, after, share)
        restrict(model, masks)
    except ValueError as error:
        raise ValueError(f"subnetwork: {error}") from None


def save_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write masks as safetensors."""
    save_file(dict(masks), path)


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what `save_masks` wrote; ValueError for a file of anything else."""
    if not Path(path).is_file():
        raise ValueError(f"subnetwork: expected a file of masks at {path}; got none")
    masks = load_file(path)
    wrong = [name for name, mask in masks.items() if mask.dtype != torch.bool]
    if wrong or not masks:
        raise ValueError(
            f"subnetwork: expected bool masks in {path}; {', '.join(wrong[:3]) or 'it is empty'}"
        )
    return masks


def restrict(model: torch.nn.Module, masks: Mapping[str, Tensor]) -> Callable[[], None]:
    """Train only what the masks mark; returns a function that lifts it again.

    Gradients of the other entries are 0. A parameter without a mask, or with one that marks nothing, is
    frozen as a whole, so that its gradient is not computed at all; therefore call it before the optimizer
    is made.

    Raises ValueError for a mask that belongs to no trained parameter, and if no entry would be trained.
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for name, mask in masks.items():
        if name not in trained or trained[name].shape != mask.shape:
            found = tuple(trained[name].shape) if name in trained else "no such trained parameter"
            raise ValueError(f"masks: expected {name} of shape {tuple(mask.shape)} in the model; got {found}")
    marked = {name: mask for name, mask in masks.items() if bool(mask.any())}
    if not marked:
        raise ValueError("masks: expected at least one entry to train; got none")
    frozen = [one for name, one in trained.items() if name not in marked]
    for parameter in frozen:
        parameter.requires_grad_(False)
    handles = [
        trained[name].register_hook(_only(mask.to(trained[name].device))) for name, mask in marked.items()
    ]

    def lift() -> None:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)

    return lift


def _only(mask: Tensor) -> Callable[[Tensor], Tensor]:
    # Not a product: an infinite gradient outside would become NaN.
    return lambda gradient: gradient.masked_fill(~mask, 0)


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str) -> Tensor:
    distance = (after[name].float() - before[name].float()).abs()
    if not bool(distance.isfinite().all()):
        raise ValueError(f"after: expected finite weights; the difference of {name} is not")
    return distance


def _kth_largest(before: Mapping[str, Tensor], after: Mapping[str, Tensor], k: int) -> float:
    """By bisection over the bits of fp32, whose order is that of the numbers from 0 on: no tensor of all."""
    low, high = (
        0,
        0x7F800000,
    )  # at least k distances are >= the number with the bits `low`, fewer than k `high`
    while high - low > 1:
        middle = (low + high) // 2
        reached = sum(int((_moved(before, after, name).view(torch.int32) >= middle).sum()) for name in before)
        low, high = (middle, high) if reached >= k else (low, middle)
    return torch.tensor(low, dtype=torch.int32).view(torch.float32).item()


def _weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"checkpoint: expected safetensors in {folder}; got none")
    return {name: tensor for path in files for name, tensor in load_file(path).items()}
