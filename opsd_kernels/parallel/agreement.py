"""What the ranks of a group tell each other before a call: who failed, and that all ask for the same.

Ranks that disagree would wait for each other for ever, or add up parts of different losses. So every call
begins with one small gather, and a mistake on one rank is an error on all of them.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.engine.problem import Rowwise
from opsd_kernels.parallel.shards import gathered
from opsd_kernels.sources import Hidden, Source, Teacher

FIELDS = (
    "function", "objective", "temperature", "reduction", "denominator", "vocab_size",
    "reduce_hidden", "token dimensions", "dtypes", "shape of the head", "requires_grad",
    "sources or workspace_bytes",
)  # fmt: skip
ROWWISE = ("mask", "rows", "token_weight", "token_ids")
SOURCES = ("student", "teacher")
PROBE = 16  # numbers of each source
# Rounding may differ between devices; another batch differs by the size of the numbers themselves.
PROBE_TOLERANCE = 0.05
TEXT_BYTES = 600


@dataclass(frozen=True)
class Request:
    """What a rank is about to do.

    Args:
        fields: what has to be the same on every rank, by the names of `FIELDS`.
        numbers: the request as int64 numbers, as many for every request.
    """

    fields: Mapping[str, Any]
    numbers: Tensor

    @classmethod
    def of(
        cls,
        columns: int,
        fields: Mapping[str, Any],
        rowwise: Rowwise,
        sources: Sequence[Source | Teacher],
    ) -> "Request":
        """The request of a rank.

        Args:
            columns: of its slice of the head.
            fields: as the class's.
            rowwise: what is said per token, the same on every rank where a token counts.
            sources: student and teacher; their hidden states are compared at a few places.
        """
        digests = [zlib.crc32(repr(fields[name]).encode()) for name in FIELDS]
        live = _live(rowwise, sources[0].lead.numel())
        checksums = torch.stack([_checksum(getattr(rowwise, name), live).cpu() for name in ROWWISE])
        probes = torch.cat([_probe(source, live) for source in sources]).cpu()
        numbers = torch.cat((torch.tensor([columns, *digests]), checksums, probes.view(torch.int64)))
        return cls(fields, numbers)


def agree(request: Request | Exception, group: dist.ProcessGroup) -> tuple[int, ...]:
    """Columns of each rank's slice, once all are known to ask for the same; one gather.

    Args:
        request: of this rank, or what went wrong before there was one.
        group: all of its ranks call this.

    Raises:
        ValueError: on every rank, where one failed or two differ; the rank that failed has its own error.
    """
    device = _device(group)
    failed = isinstance(request, Exception)
    length = 1 + len(FIELDS) + len(ROWWISE) + PROBE * len(SOURCES)
    numbers = torch.zeros(length, dtype=torch.int64) if isinstance(request, Exception) else request.numbers
    mine = torch.cat((torch.tensor([int(failed)]), numbers))
    failures, columns, *rest = gathered(mine.to(device), group).cpu().unbind(1)
    if failures.any():
        texts = _texts(str(request) if failed else "", group, device)
        if isinstance(request, Exception):
            raise request
        first = int(failures.argmax())
        raise ValueError(f"on rank {first} of the group: {texts[first]}")
    assert isinstance(request, Request)
    _compare(request, torch.stack(rest, 1), dist.get_rank(group))
    return tuple(columns.tolist())


def _compare(request: Request, numbers: Tensor, rank: int) -> None:
    """ValueError that names what is not the same on every rank."""
    exact = numbers[:, : len(FIELDS) + len(ROWWISE)]
    different = (exact != exact[0]).any(0)
    for index, name in enumerate((*FIELDS, *ROWWISE)):
        if different[index]:
            others = (exact[:, index] != exact[rank, index]).nonzero()[:, 0].tolist()
            here = f"{request.fields[name]!r}" if name in FIELDS else "one"
            raise ValueError(
                f"{name}: expected the same on every rank of the group; got {here} on rank {rank}, "
                f"another on rank {', '.join(map(str, others))}"
            )
    probes = numbers[:, len(FIELDS) + len(ROWWISE) :].contiguous().view(torch.float64)
    for name, probe in zip(SOURCES, probes.split(PROBE, 1), strict=True):
        size = probe.square().mean().sqrt()
        if ((probe - probe[0]).abs() > PROBE_TOLERANCE * size).any():
            raise ValueError(
                f"{name}.hidden: expected the same hidden states on every rank of the group; got others on "
                "some (is `group` the one of tensor parallelism, not of data parallelism?)"
            )


def _live(rowwise: Rowwise, total: int) -> Tensor | None:
    """`[N]` bool: tokens that count and have a weight; None for all. Does not wait for a device."""
    keep = rowwise.mask
    if rowwise.rows is not None:
        keep = torch.zeros(total, dtype=torch.bool, device=rowwise.rows.device).index_fill_(
            0, rowwise.rows, True
        )
    if rowwise.token_weight is not None:
        nonzero = rowwise.token_weight != 0
        keep = nonzero if keep is None else keep & nonzero
    return keep


def _checksum(x: Tensor | None, live: Tensor | None) -> Tensor:
    """int64 that depends on every number that counts, and on where it is; -1 for nothing."""
    if x is None:
        return torch.tensor(-1)
    bits = x.float().contiguous().view(torch.int32).long() if x.is_floating_point() else x.long() + 1
    if live is not None and bits.shape == live.shape and x.dtype != torch.bool:
        bits = torch.where(live, bits, 0)
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return (bits * places).sum()


def _probe(source: Source | Teacher, live: Tensor | None) -> Tensor:
    """`[PROBE]` fp64 numbers of the first hidden states that count, 0 where there are none."""
    if not isinstance(source, Hidden) or source.hidden.shape[0] == 0:
        return torch.zeros(PROBE, dtype=torch.float64)
    hidden = source.hidden.detach()
    row = torch.zeros((), dtype=torch.int64) if live is None else live.to(torch.int8).argmax()
    places = torch.linspace(0, hidden.shape[1] - 1, PROBE, device=hidden.device).long()
    found = hidden[row.to(hidden.device)][places].double().nan_to_num()
    return found if live is None else torch.where(live.any(), found, 0.0)


def _texts(text: str, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """What every rank has to say, cut after `TEXT_BYTES`."""
    line = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
    everyone = gathered(torch.frombuffer(bytearray(line), dtype=torch.uint8).to(device), group)
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in everyone.cpu()]


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where the group can gather: NCCL knows GPUs alone."""
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
