"""What a recipe's terms are divided by over a whole batch, for calls that see a part of it each."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from opsd_kernels import reductions, rollout_data
from opsd_kernels.preparers import prepare
from opsd_kernels.recipes import Recipe, Weight
from opsd_kernels.tokens import Batch, MissingInput
from opsd_kernels.weights import NEVER_ZERO, weight


def denominators(
    recipe: Recipe,
    mask: Tensor,
    data: Mapping[str, Tensor],
    total: Callable[[Tensor], Tensor] = lambda count: count,
) -> dict[str, Tensor]:
    """Exact denominators of a batch for `loss(denominator=...)` of each of its parts.

    Those of the live `"tokens"`, of the `"sequences"`, and `"term k"` of each term that is divided by
    something else, unless its weights need the teacher or a column that is not there.

    Args:
        recipe: what is minimised.
        mask: `[B, C]` bool of the whole batch.
        data: its columns, as in `loss(data=...)`.
        total: sums a count over all processes, where each has a share of the batch's rows.
    """
    live = mask.sum(1)
    found = {"tokens": live.sum(), "sequences": (live > 0).sum()}
    batch = Batch(mask, rollout_data.check_data(data, mask.shape, mask.device))
    for index, term in enumerate(recipe.terms):
        if term.normaliser in ("tokens", "sequences"):
            continue
        by_number = term.normaliser.endswith("selected")
        try:
            for spec in recipe.prepare:
                batch = replace(batch, data={**batch.data, **prepare[spec.name](batch, **spec.options)})
            w = torch.ones(mask.shape, dtype=torch.float64, device=mask.device)
            for use in map(_selecting, term.weights) if by_number else term.weights:
                w = w if use is None else w * weight[use.name](batch, **use.options)
        except MissingInput:
            continue
        found[f"term {index}"] = reductions.total(w, mask, term.normaliser)
    return {name: reductions.not_zero(total(count)) for name, count in found.items()}


def _selecting(use: Weight) -> Weight | None:
    """A weight that is 0 at the same tokens and, where there is one, needs no teacher; None for nowhere."""
    if use.name == "scope":
        return Weight("correct", {"value": use.options.get("path", "correct") == "correct"})
    return None if use.name in NEVER_ZERO else use
