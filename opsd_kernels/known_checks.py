"""Checks of teachers that are known at a few entries only, and of what is asked of them."""

from typing import Any

import torch
from torch import Tensor

from opsd_kernels.checks import FLOATS, IDS, check_plain, check_rows, check_scale, readable
from opsd_kernels.engine.parts import Parts
from opsd_kernels.known import Sampled, TopK
from opsd_kernels.objectives import Support
from opsd_kernels.sources import Several, Teacher

# By bytes of an element: how far the log of a probability near 1 may be above 0.
ROUNDING = {2: 0.125, 4: 0.01}


def check_topk(name: str, value: TopK) -> None:
    """Log-probs and distinct ids of the same shape."""
    check_log_probs(f"{name}.logprobs", value.logprobs)
    if not isinstance(value.ids, Tensor):
        raise ValueError(f"{name}.ids: expected a tensor; got {type(value.ids).__name__}")
    check_plain(f"{name}.ids", value.ids)
    if value.logprobs.dim() == 0 or value.logprobs.shape[-1] == 0:
        raise ValueError(f"{name}.logprobs: expected shape [..., K]; got {tuple(value.logprobs.shape)}")
    check_rows(f"{name}.ids", value.ids, value.logprobs.shape, value.logprobs.device, IDS)
    check_scale(f"{name}.temperature", value.temperature)
    if readable(value.ids):
        ids = value.ids.reshape(-1, value.ids.shape[-1]).sort(1).values
        if bool(((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any()):
            raise ValueError(f"{name}.ids: expected distinct entries of each token; got one twice")


def check_sampled(name: str, value: Sampled, lead: torch.Size, device: torch.device) -> None:
    """A constant log-prob for every token."""
    check_log_probs(f"{name}.logprob", value.logprob)
    check_rows(f"{name}.logprob", value.logprob, lead, device, FLOATS)
    check_scale(f"{name}.temperature", value.temperature)


def check_log_probs(name: str, value: Any) -> None:
    """A tensor of a floating-point dtype."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor; got {type(value).__name__}")
    check_plain(name, value)
    if value.dtype not in FLOATS:
        raise ValueError(f"{name}: expected a floating-point dtype; got {value.dtype}")


def check_are_log_probs(
    name: str, values: Tensor, mask: Tensor | None, rows: Tensor | None = None, known: Tensor | None = None
) -> None:
    """Log-probabilities of the tokens that count, each row of them of a mass within 1, up to rounding.

    Looked at on a CPU, and on a GPU under a mask, whose tokens a call counts there anyway.

    Args:
        name: of the argument.
        values: `[..., K]`, or `[...]` for one of each token.
        mask: bool `[...]` or None.
        rows: int `[n]` instead, indices into the flattened token dimensions.
        known: bool `[..., K]`, the entries that are any; None for all.

    Raises:
        ValueError: one is above 0, or exp of them sums to more than 1.
    """
    if not readable(values, waits=mask is not None) or values.numel() == 0:
        return
    p = values if known is None else values.masked_fill(~known, -torch.inf)
    table = p.reshape(-1, p.shape[-1] if known is not None else 1)
    if mask is not None:
        table = table.masked_fill(~mask.reshape(-1, 1), -torch.inf)
    elif rows is not None:
        table = table[rows.long()]
    table = table.nan_to_num(nan=-torch.inf).float()
    if table.numel() == 0:
        return
    highest, mass = torch.stack((table.amax(), table.exp().sum(1).amax())).tolist()
    rounding = ROUNDING[min(values.dtype.itemsize, 4)]
    if highest > rounding or mass > 1 + rounding:
        got = f"a value of {highest:.3g}" if highest > rounding else f"a token's mass of {mass:.3g}"
        raise ValueError(
            f"{name}: expected log-probabilities, none above 0 and their mass of at most 1; got {got}"
        )


def check_topks(teacher: Teacher, mask: Tensor | None, rows: Tensor | None) -> None:
    """`check_are_log_probs` of every teacher that is known at a few entries."""
    several = isinstance(teacher, Several)
    for index, part in enumerate(teacher.sources if isinstance(teacher, Several) else [teacher]):
        if isinstance(part, TopK):
            name = f"teacher.sources[{index}]" if several else "teacher"
            check_are_log_probs(f"{name}.logprobs", part.logprobs, mask, rows, part.ids >= 0)


def check_temperature(name: str, source: Teacher | Sampled, temperature: float) -> None:
    """Log-probs that were taken at another temperature than the loss has are no teacher of it."""
    if isinstance(source, TopK | Sampled) and source.temperature != temperature:
        raise ValueError(
            f"temperature: expected {source.temperature}, at which the log-probs of {name} were taken (a "
            f"tempered student against an untempered teacher is no divergence of theirs); got {temperature}"
        )


def check_topk_support(source: Teacher, support: Support | None, got: str = "the whole vocabulary") -> None:
    """A teacher known at K entries needs a loss over no others; `got` is what one without a support is of."""
    if not isinstance(source, TopK):
        return
    known = source.ids.shape[-1]
    if support is None or support.of not in ("given", "teacher"):
        got = got if support is None else f"of={support.of!r}"
        raise ValueError(
            "support: expected Support(None, 'given') or Support(k, 'teacher') for a teacher that is known "
            f"at {known} entries; got {got}"
        )
    if support.k is not None and support.k > known:
        raise ValueError(f"support: expected k of at most the {known} entries known; got {support.k}")


def given_entries(source: Teacher, support: Support | None, asked: Tensor | None) -> Tensor | None:
    """The entries of a support that is given: the caller's, or those that a teacher knows."""
    if not isinstance(source, TopK) or support is None or support.of != "given":
        return asked
    if asked is not None:
        raise ValueError("support_ids: expected None, the entries given are the teacher's; got a tensor")
    return source.ids


def given_of_parts(teacher: Teacher, parts: Parts, asked: Tensor | None) -> Tensor | None:
    """As `given_entries` for a recipe, after checking that no part asks for more than its teacher knows.

    Raises:
        ValueError: of a teacher known at a few entries others are asked for; or given supports would be
            different ones for different teachers.
    """
    sources = teacher.sources if isinstance(teacher, Several) else [teacher]
    supports = [(x.objective.support, x.teacher) for x in parts.dense if x.objective is not None]
    for support, index in supports:
        check_topk_support(sources[index], support)
    for gather in parts.gathers:
        if gather.teacher is not None:
            check_topk_support(sources[gather.teacher], gather.support, "the sampled token")
    supports += [(x.support, -1 if x.teacher is None else x.teacher) for x in parts.gathers]
    owners = {index for support, index in supports if support is not None and support.of == "given"}
    knowing = [index for index in owners if index >= 0 and isinstance(sources[index], TopK)]
    if not knowing:
        return asked
    if len(owners) > 1:
        raise ValueError(
            "support: expected one teacher with a support that is 'given' if it is a TopK, whose entries are "
            f"meant; got {len(owners)} (for the others take Support(k, 'teacher'))"
        )
    return given_entries(sources[knowing[0]], Support(None, "given"), asked)
