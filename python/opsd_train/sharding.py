"""The processes of a run: what passes through their wrapper, what they add up, and who does what."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module

from opsd_train.backbone import causal_lm
from opsd_train.engines.base import Completion
from opsd_train.rollouts import Sampling

Result = TypeVar("Result")
Write = Callable[[Sequence[Sequence[int]], Sampling, Sequence[int]], list[Completion]]


class Ranks:
    """The processes that train one model, each on its share of every step's prompts.

    The wrappers of accelerate (DDP, FSDP2, DeepSpeed) do their work in hooks around the forward pass of the
    module they wrap: they gather its weights and get ready for its gradients. But the driver needs hidden
    states and a head, not the model's own forward. So `inside` calls the wrapper with the module's `forward`
    replaced by what is to be done, and does the same with the head, whose weights are gathered once for it
    all. Without a wrapper it only calls.

    Args:
        accelerator: of the trainer.
        student: the model in training, not wrapped.

    Raises:
        ValueError: the model is wrapped or loaded in a way in which the driver cannot train it.
    """

    def __init__(self, accelerator: Accelerator, student: Module) -> None:
        self.accelerator, self.student = accelerator, student
        self.count, self.index = accelerator.num_processes, accelerator.process_index
        self.wrapped = accelerator.distributed_type != DistributedType.NO
        self.copies: list[Module] = []
        plugin = (
            accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
        )
        self.fsdp = plugin is not None
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_config: expected version 2, got {plugin.fsdp_version}")
        if plugin is not None and plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp_config: expected cpu_ram_efficient_loading false, since every process evaluates the "
                "model before it is sharded; got true"
            )

    @property
    def sharded(self) -> bool:
        """Whether no process has all of the student's weights, and all have to do the same passes."""
        return is_sharded(self.student)

    def total(self, sums: Tensor) -> Tensor:
        """The sum over all processes, of a tensor of the same shape in each."""
        if self.count == 1:
            return sums
        found: Tensor = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
        return found.to(sums.device)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process, the same answer in all."""
        return bool(self.total(torch.tensor(int(flag))))

    def first(self, action: Callable[[], Result]) -> Result | None:
        """Do it in the first process, while the others wait; only that one gets the result.

        Raises:
            RuntimeError: in the others, if it failed; the first one raises its own error.
        """
        failure: Exception | None = None
        found: Result | None = None
        try:
            found = action() if self.index == 0 else None
        except Exception as error:
            failure = error
        if self.any(failure is not None):
            raise failure or RuntimeError("the first process failed, which says why")
        return found

    def texts(self, own: str) -> list[str]:
        """The texts of all processes, in their order; all of them call it, each with its own."""
        if self.count == 1:
            return [own]
        coded = torch.from_numpy(np.frombuffer(own.encode(), dtype=np.uint8).copy())
        lengths = self._gathered(torch.tensor([len(coded)])).tolist()
        rows = self._gathered(torch.nn.functional.pad(coded, (0, max(lengths) - len(coded)))[None])
        return [row[:length].numpy().tobytes().decode() for row, length in zip(rows, lengths, strict=True)]

    def seeded(self, seed: tuple[int, ...]) -> tuple[int, ...]:
        """The seed of this process's draws: each has its own stream, the first that of a run alone."""
        return (*seed, self.index) if self.index else seed

    def shared(self, write: Write) -> Write:
        """An engine's `write` that every process calls with the same prompts and that writes a share in each.

        All get all completions, in the order of the prompts and without log-probs. Shares are of the same
        size, since passes of a sharded model have to be made by all: short ones are filled up.
        """
        return write if self.count == 1 else functools.partial(self._write_shares, write)

    def _write_shares(
        self, write: Write, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: Sequence[int]
    ) -> list[Completion]:
        size = -(-len(prompts) // self.count)
        share = list(prompts[self.index :: self.count])
        made = write(share + list(prompts[-1:]) * (size - len(share)), sampling, seed)
        longest = int(self._gathered(torch.tensor([max(len(one.tokens) for one in made)])).max())
        rows = [[one.version, len(one.tokens), *one.tokens] for one in made]
        padded = [row + [0] * (2 + longest - len(row)) for row in rows]
        found = self._gathered(torch.tensor(padded)).view(self.count, size, -1).transpose(0, 1).flatten(0, 1)
        return [
            Completion(tuple(row[2 : 2 + row[1]]), version=row[0]) for row in found[: len(prompts)].tolist()
        ]

    def _gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one process behind the other."""
        found: Tensor = self.accelerator.gather(rows.to(self.accelerator.device))
        return found.cpu()

    def loss(self, wrapper: Module, run: Callable[[], Tensor]) -> Tensor:
        """The loss that `run` computes of this process's tokens, for `backward`.

        Wrappers take the mean of the gradients over the processes; the loss is divided by the tokens of all
        of them already. It is the sum that is needed, so it is multiplied by their number.
        """
        return self.inside(wrapper, lambda: run() * self.count if self.count > 1 else run())

    def inside(self, wrapper: Module, run: Callable[[], Result]) -> Result:
        """What `run` returns, called in the forward pass of wrapper, head and sharded copies."""
        if not self.wrapped:
            return run()
        # Copies are sharded from the beginning, the student when it is prepared for training.
        own = [one for one in (self.student, *self.copies) if is_sharded(one)]
        heads = [causal_lm(one).get_output_embeddings() for one in own]
        pairs = [(one, one) for one in (*self.copies, *heads)]
        if wrapper is not self.student or self.sharded:
            pairs.insert(0, (wrapper, self.student))
        return through(pairs, run)

    def hold_head(self, held: bool) -> None:
        """Keep the student's head whole between the micro-batches of an optimizer step, or no longer.

        Its weights change in the optimizer step alone, so what was gathered once does for every pass until
        then, rollouts and a teacher of the same weights among them. FSDP2 lets go of the head after the
        backward pass that follows `held=False`, which reduces its gradient too; ZeRO-3, which reduces after
        every backward pass, in the optimizer step itself.
        """
        if not self.sharded:
            return
        head = causal_lm(self.student).get_output_embeddings()
        unit = head if isinstance(head, FSDPModule) else self.student  # which has what is in no unit below
        if isinstance(unit, FSDPModule):
            unit.set_reshard_after_backward(not held, recurse=False)
        else:
            for weight in head.parameters():
                # No public option does: persistence goes by size, and the order of modules has to repeat.
                weight.is_external_param = True  # the optimizer step alone releases it

    def adopt(self, model: Module) -> Module:
        """A frozen copy where the student is: sharded like it under FSDP2, else whole on the device."""
        if model is self.student or not self.wrapped:
            return model
        if not self.fsdp:
            return model.to(self.accelerator.device)
        sharded: Module = fsdp2_prepare_model(self.accelerator, model)
        self.copies.append(sharded)
        return sharded


def shard_on_cpus(state: PartialState) -> None:
    """Let accelerate shard by FSDP2 on CPUs as it does on accelerators, instead of not sharding at all.

    It asks for processes with an accelerator each; FSDP2 itself needs none.
    """
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def is_sharded(model: Module) -> bool:
    """Whether a process has a part of the weights only: FSDP2 or ZeRO-3."""
    # Not by a parameter's type: FSDP2 leaves the last ones whole between a forward pass and its backward one.
    return isinstance(model, FSDPModule) or hasattr(next(model.parameters()), "ds_id")


def reshard(model: Module) -> None:
    """Drop what FSDP2 holds whole of a model, so that the next pass gathers what its shards are then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Inside, parameters that ZeRO-3 has partitioned are whole in every process; others are as they are."""
    partitioned = [one for one in parameters if hasattr(one, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed  # only who trains with it has it installed

    found: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(partitioned)
    return found


@torch.no_grad()
def state_of(model: Module) -> dict[str, Tensor]:
    """Every weight of a sharded model by its name, whole, on the CPU of the main process; else nothing.

    One weight at a time is whole on the devices. All processes have to call it.
    """
    found: dict[str, Tensor] = {}
    for name, weight in itertools.chain(
        model.named_parameters(remove_duplicate=False), _saved_buffers(model)
    ):
        with gathered([weight]):
            all_of_it = whole(weight.detach())
            if is_main():
                found[name] = all_of_it.cpu().clone()
    return found


def _saved_buffers(model: Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    return ((name, one) for name, one in model.named_buffers() if name in saved)


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one by a collective of its processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, sharded like another one of its shape."""
    if not isinstance(like, DTensor):
        return tensor
    moved = tensor.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def through(pairs: Sequence[tuple[Module, Module]], run: Callable[[], Result]) -> Result:
    """What `run` returns, called while each of these modules is in its forward pass, the first outermost.

    Of a pair, the first is called, and the second, a module that it calls or itself, has its `forward`
    replaced. `run` may call it as usual.
    """
    if not pairs:
        return run()
    (outer, inner), *rest = pairs
    returned: list[Result] = []
    with _replaced(inner) as replace:

        def forward(*args: Any, **kwargs: Any) -> Result:
            replace(None)
            returned.append(through(rest, run))
            return returned[0]

        replace(forward)
        found: Result = outer(None)  # DDP looks at its first argument's device
    return _exact(returned[0], found)


@contextmanager
def _replaced(module: Module) -> Iterator[Callable[[Callable[..., Any] | None], None]]:
    """Gives a function that replaces a module's `forward`, and with None puts back what it was."""
    own = module.__dict__.get("forward")  # accelerate sets one for autocast

    def replace(forward: Callable[..., Any] | None) -> None:
        if forward is not None or own is not None:
            module.forward = forward or own  # type: ignore[assignment]
        else:
            module.__dict__.pop("forward", None)

    try:
        yield replace
    finally:
        replace(None)


def _exact(computed: Result, returned: Result) -> Result:
    """The value as computed with the gradient as returned: FSDP2 rounds what a forward returns to bf16."""
    if not isinstance(computed, Tensor) or not isinstance(returned, Tensor):
        return returned
    if returned.dtype == computed.dtype:
        return returned
    return computed.detach() + (returned - returned.detach()).to(computed.dtype)  # type: ignore[return-value]
