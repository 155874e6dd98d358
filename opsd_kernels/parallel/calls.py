"""A call over a sharded vocabulary: checked, agreed with the other ranks, and given to the engine."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from opsd_kernels import ops, source_checks
from opsd_kernels.call import Call
from opsd_kernels.checks import check_ids
from opsd_kernels.engine import packing
from opsd_kernels.engine.teachers import needs_whole_rows
from opsd_kernels.objectives import Objective, named_objectives
from opsd_kernels.options import LossOptions, SourceLike
from opsd_kernels.parallel.agreement import Request, agree
from opsd_kernels.parallel.shards import Shard, replicated
from opsd_kernels.sources import Hidden, Logits, LogLinear, Routed

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Asked:
    """Who asks for what.

    Args:
        function: name of the public function.
        group: the ranks that hold the vocabulary; None for the default group.
        reduce_hidden: whether the gradient of the hidden states is summed over the ranks.
        known: options that the function has; None for all of `LossOptions`.
    """

    function: str
    group: dist.ProcessGroup | None
    reduce_hidden: bool
    known: frozenset[str] | None = None

    def options(self, given: dict[str, Any]) -> LossOptions:
        """The options, if the function has them and a sharded head can do them."""
        known = self.known or {field.name for field in fields(LossOptions)}
        if unknown := sorted(set(given) - known):
            expected = ", ".join(sorted(known))
            raise ValueError(f"{self.function}: expected options among {expected}; got {', '.join(unknown)}")
        options = LossOptions(**given)
        _check_supported(options)
        return options


def sharded_call(
    asked: Asked, student: SourceLike, teacher: Any, weight: Tensor | None, options: dict[str, Any]
) -> tuple[Call, Shard]:
    """The call over this rank's real columns; its operators reduce over the group.

    Raises:
        ValueError: on every rank, also where only one of them is wrong.
    """
    group = _group(asked.group)
    call, request = _checked(asked, student, teacher, weight, options)
    widths = agree(request, group)
    assert call is not None
    given = call.options
    vocab = sum(widths) if given.vocab_size is None else given.vocab_size
    if type(vocab) is not int or not 1 <= vocab <= sum(widths):
        raise ValueError(
            f"vocab_size: expected an int in [1, {sum(widths)}], the columns of all ranks; got {vocab}"
        )
    starts = [sum(widths[:rank]) for rank in range(len(widths))]
    columns = tuple(max(0, min(width, vocab - start)) for start, width in zip(starts, widths, strict=True))
    shard = Shard(group, columns)
    _check_token_ids(call, vocab)
    source = call.student.flat(shard.mine)
    if asked.reduce_hidden:
        source = replicated(source, group)
    packed = replace(call.packed, shard=ops.shard_handle(shard))
    return replace(call, student=source, teacher=call.teacher.flat(shard.mine), packed=packed), shard


def _group(group: Any) -> dist.ProcessGroup:
    """The group, or the default one."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "group: expected a process group; got no torch.distributed "
            "(call torch.distributed.init_process_group first)"
        )
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(f"group: expected a process group that this process is in; got {group!r}")
    return group


def _checked(
    asked: Asked, student: SourceLike, teacher: Any, weight: Tensor | None, options: dict[str, Any]
) -> tuple[Call | None, Request | Exception]:
    """The call over this rank's slice, or what is wrong with it: the others must hear of any failure."""
    try:
        given = asked.options(options)
        if asked.function == "token_logprobs":
            teacher = _constant(student, given)
        source_checks.check_weight_is_used([student, teacher], weight)
        s, t = (_with_columns(_as_source(x, weight)) for x in (student, teacher))
        # Ids of the whole vocabulary and its size are checked when all ranks' columns are known.
        call = Call.of(s, t, None, replace(given, token_ids=None, vocab_size=None))
        if needs_whole_rows(call.teacher):
            raise ValueError(
                "teacher: expected Hidden, Logits, LogLinear or Routed of these for a sharded head; got "
                f"{type(call.teacher).__name__}, which needs whole rows"
            )
        ids = given.token_ids
        rowwise = replace(call.rowwise, token_ids=None if ids is None else _flat_ids(ids, call.lead))
        call = replace(call, rowwise=rowwise, options=given)
        return call, _request(asked, call, _columns(student, weight))
    except Exception as error:
        return None, error


def _request(asked: Asked, call: Call, columns: int) -> Request:
    options, student = call.options, call.student
    denominator = options.denominator
    same = {
        "function": asked.function,
        "objective": call.packed.objective,
        "temperature": options.temperature,
        "reduction": options.reduction,
        "denominator": "a tensor" if isinstance(denominator, Tensor) else denominator,
        "vocab_size": options.vocab_size,
        "reduce_hidden": asked.reduce_hidden,
        "token dimensions": tuple(call.lead),
        "dtypes": [str(x.dtype) for x in (*student.tensors, *call.teacher.tensors)],
        "shape of the head": [x.shape[1] for x in student.tensors[1:2]],
        "requires_grad": [x.requires_grad and torch.is_grad_enabled() for x in student.tensors],
        "sources or workspace_bytes": packing.pack(student, call.teacher, call.packed),
    }
    return Request.of(columns, same, call.rowwise, (student, call.teacher))


def _check_supported(options: LossOptions) -> None:
    """What needs whole rows, or a walk of its own, is refused by name."""
    objective = options.objective
    names = ", ".join(named_objectives())
    named = isinstance(objective, str) and objective in named_objectives()
    if not named and not isinstance(objective, Objective):
        raise ValueError(
            f"objective: expected an Objective or one of {names} for a sharded head; got {objective!r}: "
            "methods of several terms need a whole head"
        )
    if isinstance(objective, Objective) and objective.support is not None:
        raise ValueError(
            "objective.support: expected None for a sharded head, the whole vocabulary; "
            f"got {objective.support}"
        )
    if options.reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction: expected one of {', '.join(REDUCTIONS)} for a sharded head; "
            f"got {options.reduction!r} (take 'none' and reduce its result)"
        )
    if options.backend not in ("auto", "torch"):
        raise ValueError(f"backend: expected 'auto' or 'torch' for a sharded head; got {options.backend!r}")
    for name in ("support_ids", "grad_filter", "data"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: expected None for a sharded head; got a value")


def _constant(student: Any, options: LossOptions) -> Any:
    """The student without gradient, which stands where a call expects a teacher."""
    if options.token_ids is None:
        raise ValueError("token_ids: expected a tensor; got None")
    if isinstance(student, Hidden | Logits):
        return student.with_tensors([x.detach() for x in student.tensors])
    return student.detach() if isinstance(student, Tensor) else student


def _flat_ids(ids: Any, lead: torch.Size) -> Tensor:
    if not isinstance(ids, Tensor) or ids.shape != lead or ids.is_floating_point() or ids.dtype == torch.bool:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"token_ids: expected integers of shape {tuple(lead)}; got {shape}")
    return ids.reshape(-1).long()


def _check_token_ids(call: Call, vocab: int) -> None:
    ids = call.rowwise.token_ids
    if ids is None:
        return
    if call.rowwise.mask is not None:
        ids = ids[call.rowwise.mask] if ids.device.type == "cpu" else None
    elif call.rowwise.rows is not None:
        ids = ids[call.rowwise.rows]
    check_ids("token_ids", ids, 0, vocab)


def _as_source(value: Any, weight: Tensor | None) -> Any:
    if not isinstance(value, Tensor) or weight is None:
        return value
    return Hidden(value, weight)


def _with_columns(source: Any) -> Any:
    """The source with a column for the checks where this rank's slice has none; it is cut off again."""
    if isinstance(source, Hidden) and _is_empty(source.weight, 0):
        bias = None if source.bias is None else F.pad(source.bias, (0, 1))
        return replace(source, weight=F.pad(source.weight, (0, 0, 0, 1)), bias=bias)
    if isinstance(source, Logits) and _is_empty(source.z, -1):
        return replace(source, z=F.pad(source.z, (0, 1)))
    if isinstance(source, LogLinear):
        return replace(source, streams=[(factor, _with_columns(x)) for factor, x in source.streams])
    if isinstance(source, Routed):
        return replace(source, sources=[_with_columns(x) for x in source.sources])
    return source


def _is_empty(tensor: Any, dim: int) -> bool:
    """Whether this rank has no column; a nested tensor, which `Call` refuses, has no size to ask for."""
    return isinstance(tensor, Tensor) and not tensor.is_nested and tensor.shape[dim] == 0


def _columns(student: Any, weight: Tensor | None) -> int:
    """Rows of this rank's slice of the head, which may be none."""
    vocab: int = _as_source(student, weight).vocab
    return vocab
