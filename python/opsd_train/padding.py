"""Models that read padding: what stands before a row on the left changes what they make of it.

Recurrent models may take an attention mask and not look at it. Padding behind a row does them no harm, so
that is how such a model reads; it writes one row at a time, see `rollouts.generate`.
"""

import torch

from opsd_kernels.integrations.hf import causal_lm

_READS = "_opsd_reads_padding"  # on the model, so that its copies and wrappers know it too


def reads_padding(model: torch.nn.Module) -> bool:
    """Whether the model was found to."""
    return bool(getattr(causal_lm(model), _READS, False))


def note_padding(model: torch.nn.Module, reads: bool) -> None:
    """Remember whether the model reads padding, see `backbone.check_padding`."""
    setattr(causal_lm(model), _READS, reads)


def moved_behind(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns `[B, L]` int64 that bring the padding on the left of each row to its end, and those back.

    `ids.gather(1, there)` is padded on the right alone, and `there` of it undone by `gather(1, back)`.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    padding = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    return (columns + padding) % len(columns), (columns - padding) % len(columns)
