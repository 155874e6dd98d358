"""On-policy self-distillation as a `transformers.Trainer`: the student writes, the teacher reads along."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

import opsd_kernels
from opsd_kernels import Hidden, LogLinear, Objective, TopK
from opsd_train.backbone import causal_lm, check_head, check_positions, completion_hidden, head_source
from opsd_train.config import OPSDConfig
from opsd_train.data.sampler import parts_of
from opsd_train.engines.agreement import Agreement, as_engines_read, check_engine_columns
from opsd_train.engines.make import make_engine
from opsd_train.evaluation.examined import EVALUATION, TRAINING, Examined
from opsd_train.method import MethodRun
from opsd_train.offline.train import StoredReaders, StoredRollouts
from opsd_train.pieces.effopd import hold_back
from opsd_train.pieces.parts import Pieces
from opsd_train.reading.prompts import Prompt
from opsd_train.reading.readers import Readers
from opsd_train.rollouts import Rollout, Sampling, Vocabulary, check_alignment, counted
from opsd_train.safety import stops
from opsd_train.safety.atomic import AtomicCheckpoints
from opsd_train.safety.checkpoints import StepCallback
from opsd_train.safety.finite import FiniteSteps
from opsd_train.safety.lock import FolderLock
from opsd_train.sharding import Ranks, shard_on_cpus
from opsd_train.steps import Written, method_batches, plain_batches
from opsd_train.teachers.weights import Teacher, make_teacher
from opsd_train.watch.completions import Completions
from opsd_train.watch.meter import LastStepCallback, Meter, logs_next
from opsd_train.watch.metrics import teacher_mass


class OPSDTrainer(FiniteSteps, AtomicCheckpoints, Examined):
    """Minimises the divergence between student and teacher on the student's own rollouts.

    One optimizer step is::

        rollouts = engine.write(prompts)                          # get_batch_samples: for the whole step
        for batch in micro_batches(rollouts):                     # compute_loss
            h_s = backbone(student, student_prompt + completion)  # hidden states of the completion alone
            h_t = backbone(teacher, teacher_prompt + completion)  # the very same tokens, no gradient
            opsd_kernels.loss(h_s, h_t, lm_head.weight, denominator=step_tokens).backward()
        optimizer.step(); teacher.after_optimizer_step()

    The rollouts of a step are drawn together from random numbers that the seed and the step determine, and
    the loss is the mean over all their tokens: how a step is cut into micro-batches changes neither. But what
    ranks or scales tokens by statistics of the batch (weights of tip, fire and others) sees one micro-batch.

    Args:
        model: a causal language model, or a PEFT model of one. As given here it is the initial teacher.
        args: the configuration.
        train_dataset: encoded prompts (`Encoder.encode`).
        processing_class: the tokenizer.
        eval_dataset: prompts with answers, for `evaluate`.
        callbacks: further callbacks.
        method: a method of the literature, in place of the configuration's objective.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the tokens of the whole step

    def __init__(
        self,
        model: torch.nn.Module,
        args: OPSDConfig,
        train_dataset: Sequence[Prompt],
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Sequence[Prompt] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        method: MethodRun | None = None,
    ) -> None:
        args.check_devices()
        if args.fsdp:
            shard_on_cpus(args.distributed_state)
        self.config, self.tokenizer, self.student = args, processing_class, model
        self.prompts, self.held_out = train_dataset, list(eval_dataset or [])
        self.validation: Sequence[Prompt] = []
        if args.extrapolate:
            self.prompts, self.validation = hold_back(train_dataset, args.extrapolate)
        args.max_steps = args.steps_for(len(self.prompts))
        self.stored = None
        if args.offline is not None:
            self.stored = StoredRollouts(args.offline, train_dataset, args.loss_temperature)
        self.judge = args.to_judge()
        self.judge.require([*self.held_out, *self.validation])
        check_positions(model, [*train_dataset, *self.held_out], args.max_completion_length)
        self.objective: Objective = args.to_objective()
        self.method = method
        check_engine_columns(() if method is None else method.needs, args)
        self.vocabulary = Vocabulary.of(causal_lm(model), processing_class)
        self.sampling = Sampling(
            args.temperature, args.top_p, args.top_k, args.max_completion_length, args.generation_batch_size
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.prompts,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=list,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(LastStepCallback())
        self.ranks = Ranks(self.accelerator, model)
        self.lock: FolderLock | None = None  # of the run's folder, given back when the run ends
        check_head(model, train_dataset[0].student_ids)
        self.readers: Readers | StoredReaders | None = None
        if self.stored is None or method is None:
            self.teacher = make_teacher(args.to_teacher(), model, processing_class)
            if method is not None:
                self.readers = Readers(method, model, self.teacher, args.to_teacher())
        else:
            self.teacher = Teacher(model)  # nobody asks it
            self.readers = StoredReaders(method, self.stored.top_k)
        self.teacher.place(self.ranks.adopt)
        if isinstance(self.readers, Readers):
            self.readers.place(self.ranks.adopt)
        self.pieces = Pieces(args, model, self.teacher, method, len(self.prompts), self.validate)
        self.add_callback(StepCallback(self))
        self.meter = Meter(args.device, args.max_completion_length, self.ranks.total)
        self.agreement = Agreement()
        self.completions = Completions(
            args.output_dir or ".",
            args.save_completions_every,
            processing_class,
            self.ranks.texts,
            writes=args.process_index == 0,
        )
        self.engine = make_engine(args, model, processing_class, self.vocabulary)
        self.engine_behind = True  # its weights are not those of the student, as after every step

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Prompt]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], int]:
        """Draw the rollouts of one optimizer step; returns its micro-batches and its number of tokens."""
        self.meter.begin_step()
        self.agreement.begin_step()
        self.ranks.hold_head(True)
        written = self._write(list(itertools.islice(epoch_iterator, num_batches)))
        self.engine.rest()
        self.expect(written)
        self.meter.count(written.rollouts)
        if not written.rollouts:
            return [{}], 0
        counting, pad_id, exposure = self.config.to_counting(), self.vocabulary.pad_id, self.pieces.exposure
        if self.method is None:
            self.completions.keep(written.step, written.rollouts)
            return self.pieces.empty.heard(*plain_batches(written, counting, pad_id, self.ranks.total))
        method = self.method if exposure is None else exposure.exposed()
        batches, step = method_batches(written, method, counting, pad_id, self.ranks.total)
        self.meter.reward(step.rewards)
        self.completions.keep(written.step, written.rollouts, step.rewards)
        if exposure is not None:
            exposure.read(step, pad_id)
        tokens = sum(len(rollout.completion) for rollout in written.rollouts)
        return self.pieces.empty.heard(batches, int(self.ranks.total(torch.tensor(tokens))))

    def _write(self, batches: Sequence[Sequence[Prompt]]) -> Written:
        """The rollouts of the step that is next, in the parts of these batches."""
        step = self.state.global_step
        prompts = [prompt for batch in batches for prompt in batch]
        parts = parts_of([len(batch) for batch in batches])
        if self.pieces.private is not None:
            prompts = self.pieces.private.draw(self.prompts, step)
            parts = [slice(0, len(prompts))]
        if self.stored is not None:
            stored = self.stored.take(prompts, self.config.seed, step)
            return Written(step, [one.rollout for one in stored], parts, stored)
        sampling = dataclasses.replace(
            self.sampling, max_tokens=self.config.longest(step, self.sampling.max_tokens)
        )
        return Written(step, self.roll_out(prompts, sampling, (TRAINING, step)), parts)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The gradient of a micro-batch, or of a whole private step; returns the part's loss."""
        private, exposure = self.pieces.private, self.pieces.exposure
        if self.accelerator.sync_gradients:  # the last of the step
            self.ranks.hold_head(False)
        if private is None:
            with self.meter.phase("backward"):  # less the phases inside
                loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            model.train()
            batch = self._prepare_inputs(inputs) if inputs else {}
            with self.compute_loss_context_manager():
                loss = private.step(batch, self.state.global_step, lambda row: self.compute_loss(model, row))
        self.hear(inputs, loss, loss_skips=private is None)
        if exposure is not None:
            exposure.hear(loss)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Sum of the divergences at the micro-batch's completion tokens over the tokens of the whole step."""
        if return_outputs:
            raise ValueError("return_outputs: expected False, since no logits are formed; got True")
        inner = self.student if self.ranks.wrapped else model
        return self.ranks.loss(model, lambda: self._loss(inner, inputs, num_items_in_batch))

    def _loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], tokens: torch.Tensor | int | None
    ) -> torch.Tensor:
        """What this process adds to the loss of the step, called inside the wrapper's forward pass."""
        mask = counted(inputs)
        settings: dict[str, Any] = {
            "mask": mask,
            "temperature": self.config.loss_temperature,
            "token_ids": inputs["input_ids"][:, -mask.shape[1] :],
        }
        student, teacher, what = self._minimised(model, inputs, tokens)
        self.agreement.hear(
            lambda: as_engines_read(model, student, inputs, self.accelerator.autocast), inputs
        )
        # What a cache holds of a teacher, or a server says, is no distribution that could be measured.
        partial = self.stored is not None or not self.teacher.is_whole
        with self.meter.phase("loss"):
            if partial or not logs_next(self.args, self.state):
                return opsd_kernels.loss(student, teacher, **settings, **what)
            loss, stats = opsd_kernels.loss_and_stats(student, teacher, **settings, **what)
            k, temperature = self.config.mass_top_k, self.config.loss_temperature
            self.meter.add(stats, mask, teacher_mass(student, teacher, mask, k, temperature))
        return loss

    def _minimised(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], tokens: torch.Tensor | int | None
    ) -> tuple[Hidden, Any, dict[str, Any]]:
        """Student, teacher or teachers by role, and the options that say what is minimised."""
        if self.method is None or self.readers is None:
            student, teacher = self.distributions(model, inputs)
            return student, teacher, {"objective": self.objective, "denominator": tokens}
        with self.accelerator.autocast():
            step = self.state.global_step
            student, teachers, data = self.readers.read(
                model, inputs, self.config.loss_temperature, step, self.meter.phase
            )
        counts = {name[6:]: count for name, count in inputs.items() if name.startswith("count_")}
        recipe = self.method.recipe(step)
        what = {"objective": recipe, "data": data, "denominator": None if tokens is None else counts}
        return student, teachers, what

    def distributions(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[Hidden, Hidden | LogLinear | TopK]:
        """The next-token distributions of student and teacher at the completion's tokens, [B, C].

        Raises ValueError for a batch in which they are not those of the same tokens.
        """
        check_alignment(inputs)
        length = inputs["completion_mask"].shape[1]
        with self.accelerator.autocast():
            with self.meter.phase("student"):
                hidden = completion_hidden(model, inputs["input_ids"], inputs["attention_mask"], length)
            student = head_source(model, hidden)
            with self.meter.phase("teacher"):
                return student, self.teacher.beside(student, inputs, length)

    def roll_out(
        self, prompts: Sequence[Prompt], sampling: Sampling, stream: tuple[int, int]
    ) -> list[Rollout]:
        """Let the student complete every prompt."""
        seed = self.ranks.seeded((self.config.seed, *stream))
        ids = [prompt.student_ids for prompt in prompts]
        # The prompts of a training step are this process's already.
        shared = stream[0] == EVALUATION
        own = stops.agreed()(self.engine.write)  # before shares are gathered, which needs all processes
        write = self.ranks.shared(own) if shared else own
        if self.engine_behind:
            with self.meter.phase("sync"):
                self.engine.follow(self.state.global_step)
            self.engine_behind = False
        with self.meter.phase("rollout"):
            written = write(ids, sampling, seed)
        ends = self.vocabulary.eos_ids
        return [
            Rollout(prompt, one.tokens, one.tokens[-1] not in ends, one.logprobs, one.version)
            for prompt, one in zip(prompts, written, strict=True)
        ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the meter holds to the metrics of a training step."""
        if "loss" in logs:
            logs |= self.meter.read() | self.agreement.metrics()
            logs |= self.pieces.metrics(self.state.global_step)
        super().log(logs, start_time)
