"""Vocabulary-parallel heads on two and three gloo processes.

Each number of ranks is started once. Every rank runs all the checks, in `parallel_checks.py` and
`parallel_group_checks.py`; a test reads what became of one of them.
"""

import json
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import parallel_checks as parallel_checks
import parallel_group_checks as parallel_group_checks
from opsd_kernels import loss, parallel, token_stats
from opsd_kernels.testing import evaluate, hidden_case, hidden_sources
from parallel_ranks import CHECKS, Ranks

WAIT = timedelta(seconds=60)
Results = dict[str, list[str]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """What went wrong with each check, rank by rank, for a number of ranks; nothing if it passed."""
    known: dict[int, Results] = {}

    def of(world: int) -> Results:
        if world not in known:
            folder = tmp_path_factory.mktemp("ranks")
            mp.spawn(_rank, (world, str(folder)), nprocs=world)
            known[world] = {name: [] for name in CHECKS}
            for rank in range(world):
                for name, text in json.loads((folder / f"{rank}.json").read_text()).items():
                    known[world][name].append(f"rank {rank}:\n{text}")
        return known[world]

    return of


def _rank(rank: int, world: int, folder: str) -> None:
    """Runs every check; each has a group of its own, so that one that fails leaves the next in step."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory from torch.empty is full of NaN
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=WAIT
    )
    failures = {}
    for name, function in CHECKS.items():
        group = dist.new_group(timeout=WAIT)
        try:
            function(Ranks(rank, world, group))
        except Exception:
            failures[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", sorted(CHECKS))
@pytest.mark.parametrize("world", [2, 3])
def test_ranks(results: Callable[[int], Results], world: int, name: str) -> None:
    failures = results(world)[name]
    assert not failures, "\n".join(failures)


def test_without_torch_distributed() -> None:
    assert not dist.is_initialized()
    student, teacher = hidden_sources(hidden_case(4, 10, 3).to(torch.float32))
    for call in (parallel.loss, parallel.loss_and_stats, parallel.token_stats):
        with pytest.raises(ValueError, match="init_process_group"):
            call(student, teacher)
    with pytest.raises(ValueError, match="init_process_group"):
        parallel.token_logprobs(student, torch.zeros(4, dtype=torch.int64))


def test_one_rank_is_one_process(tmp_path: Path) -> None:
    """A group of one rank gives the bits of a whole head: loss, statistics and every gradient."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case = hidden_case(6, 33, 4, bias=True).to(torch.bfloat16).having(objective="jsd")
        for reduction in ("mean", "none"):
            here = case.having(reduction=reduction)
            mine, single = evaluate(parallel.loss, here), evaluate(loss, here)
            assert torch.equal(mine.loss, single.loss)
            assert all(torch.equal(x, single.gradients[name]) for name, x in mine.gradients.items())
        pair = hidden_sources(case)
        for x, y in zip(parallel.token_stats(*pair), token_stats(*pair), strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())
    finally:
        dist.destroy_process_group()
