"""Counts the collectives that make a sharded head whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from opsd_train.backbone import causal_lm
from opsd_train.safety.optimizer_state import full_weights
from opsd_train.sharding import is_sharded, state_of

SAVED_IN = 2  # the step, from 0, between whose micro-batches the weights are looked at


class HeadGathers(TrainerCallback):
    """How often FSDP2 or ZeRO-3 gathers the student's head in each optimizer step, its rollouts included.

    In the third step a checkpoint's weights are taken after every micro-batch but the last, as a run that is
    stopped there does; that takes gathers of its own.
    """

    def __init__(self) -> None:
        self.count = 0
        self.steps: list[int] = []
        self.saved: list[bool] = []  # whether these weights were those at the step's begin
        self.begin: dict[str, Tensor] = {}

    def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        """The model is sharded by now, and nobody has used it since."""
        student = getattr(model, "module", model)
        head = causal_lm(student).get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.set_custom_all_gather(_AllGather(self))
        elif hasattr(head.weight, "ds_id"):
            for one in student.parameters():
                one.all_gather = self._counted(one, one.all_gather, head.weight)
                one.all_gather_coalesced = self._counted(one, one.all_gather_coalesced, head.weight)

    def on_step_begin(self, args: Any, state: TrainerState, *_: Any, model: Any, **kwargs: Any) -> None:
        """Take the weights, none of which has moved."""
        if state.global_step == SAVED_IN and is_sharded(getattr(model, "module", model)):
            self.begin = state_of(getattr(model, "module", model))

    def on_substep_end(self, args: Any, state: TrainerState, *_: Any, model: Any, **kwargs: Any) -> None:
        """Take them again, as a checkpoint does."""
        student = getattr(model, "module", model)
        if state.global_step != SAVED_IN or not is_sharded(student):
            return
        sharded = isinstance(student, FSDPModule)
        found = full_weights(student) if sharded else state_of(student)
        if sharded:  # its optimizer knows them by their shards
            assert all(isinstance(one, DTensor) for one in student.parameters())
        same = found.keys() == self.begin.keys()
        self.saved.append(same and all(torch.equal(found[name], one) for name, one in self.begin.items()))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The next one begins."""
        self.steps.append(self.count)
        self.count = 0

    def _counted(self, own: Tensor, gather: Callable[..., Any], head: Any) -> Callable[..., Any]:
        """A method that DeepSpeed gives every weight, which gathers a list of them or that one."""

        def counted(param_list: Any = None, *args: Any, **kwargs: Any) -> Any:
            listed = [own] if param_list is None else list(param_list)
            self.count += head.ds_status.name == "NOT_AVAILABLE" and any(one is head for one in listed)
            return gather(listed, *args, **kwargs)

        return counted


class _AllGather(DefaultAllGather):
    """That of FSDP2, for the unit which the head is in."""

    def __init__(self, counter: HeadGathers) -> None:
        self.counter = counter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.counter.count += 1
        return super().__call__(*args, **kwargs)
