"""DTensor heads as slices and a group, which is what the functions here take."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from opsd_kernels.sources import Hidden


def from_dtensor(source: Hidden) -> tuple[Hidden, dist.ProcessGroup]:
    """The source over this rank's slices, and the group that holds the others.

    Gradients flow back to the DTensors. Its rows are divided as `torch.distributed.tensor.Shard(0)` divides
    them, which may leave the last ranks with fewer or none.

    Args:
        source: weight a DTensor `[V, H]` that is `Shard(0)` on a mesh of one dimension (a `colwise` head);
            bias likewise, or None; hidden states a plain tensor, or a DTensor that is replicated there.

    Raises:
        ValueError: another placement, or several mesh dimensions.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    weight: Any = source.weight
    if not isinstance(weight, DTensor):
        raise ValueError(f"weight: expected a DTensor; got {type(weight).__name__}")
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        raise ValueError(f"weight: expected a mesh of one dimension; got {mesh.ndim} (slice the mesh)")

    def local(name: str, x: Any, placement: Any) -> Tensor:
        if x.device_mesh != mesh or tuple(x.placements) != (placement,):
            raise ValueError(f"{name}: expected {placement} on the head's mesh; got {x.placements}")
        found: Tensor = x.to_local(grad_placements=[placement])
        return found

    hidden: Any = source.hidden
    if isinstance(hidden, DTensor):
        hidden = local("hidden", hidden, Replicate())
    bias: Any = source.bias
    if bias is not None:
        if not isinstance(bias, DTensor):
            raise ValueError(f"bias: expected a DTensor beside a DTensor weight; got {type(bias).__name__}")
        bias = local("bias", bias, Shard(0))
    slices = Hidden(hidden, local("weight", weight, Shard(0)), bias, source.logit_scale, source.softcap)
    return slices, mesh.get_group()
