"""Everything a run can be told beside the model and the data."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

import opsd_kernels
from opsd_kernels import named_objectives
from opsd_train.engines.config import EngineConfig
from opsd_train.fields import check_finite, option
from opsd_train.inherited import check_inherited
from opsd_train.method_config import MethodConfig
from opsd_train.objectives import objective
from opsd_train.pieces.config import PiecesConfig
from opsd_train.reading import prompts
from opsd_train.reading.config import ThinkingConfig
from opsd_train.redaction import redact, redacted
from opsd_train.safety.config import SafetyConfig
from opsd_train.safety.zero_options import check_options as check_zero
from opsd_train.teachers.rule import TeacherRule
from opsd_train.teachers.served_config import ServedConfig
from opsd_train.watch.config import WatchConfig


@dataclass
class OPSDConfig(
    EngineConfig,
    ServedConfig,
    WatchConfig,
    SafetyConfig,
    ThinkingConfig,
    PiecesConfig,
    MethodConfig,
    TrainingArguments,
):
    """Arguments of `OPSDTrainer`: those of `transformers.TrainingArguments` and the ones below.

    Some defaults of the former are others here: 100 steps, an evaluation and a checkpoint every 20 of them, a
    learning rate of 5e-6, a line of metrics every 5 steps, and losses logged as they are, finite or not.
    """

    # What is minimised
    objective: str = option(
        "forward_kl", "Divergence by name: " + ", ".join(named_objectives()) + "; methods are --method."
    )
    beta: float | None = option(
        None,
        "The teacher's share of the mixture in `jsd` and the `skew_` divergences, or the weight in `alpha` "
        "and `mixed`; None keeps the objective's own.",
    )
    entry_clip: float | None = option(
        None,
        "Bound of the term of each vocabulary entry, or of its log-ratio; None keeps the objective's own.",
    )
    clip_mode: str | None = option(
        None,
        "`zero` (as published) drops a clipped entry's gradient, `scale` shrinks it: both can push down what "
        "the teacher raises. `ratio` cannot: forward KL to a bounded log-ratio. None keeps what it was.",
    )
    token_clip: float | None = option(
        None, "Upper bound of the loss of a token; None keeps the objective's own."
    )
    loss_temperature: float = option(1.0, "Temperature of both distributions in the loss.")

    # Who teaches
    teacher: str = option(
        "initial",
        "Weights of the teacher: `initial` (adapters off, or a frozen copy), `live` (those of this step; it "
        "tends to collapse), `ema` (their moving average), `sync` (a copy of the student, renewed every "
        "teacher_every steps), `trust_region` (a geometric mixture of `initial` and `live`), `model` "
        "(another model) or `served` (a model behind a vLLM server, at teacher_url).",
    )
    ema_decay: float = option(
        0.98, "teacher = decay * teacher + (1 - decay) * student, every teacher_every optimizer steps."
    )
    teacher_every: int = option(1, "Optimizer steps between two updates of an `ema` or `sync` teacher.")
    teacher_copy_every: int = option(
        0, "Set an `ema` teacher to the student after every so many optimizer steps; 0 is never."
    )
    teacher_share: float = option(0.05, "Share of `live` in a `trust_region` teacher.")
    teacher_model: str | None = option(
        None, "Local folder or hub id of the teacher `model`, which shares the student's tokenizer."
    )

    # How the student writes
    temperature: float = option(1.0, "Temperature the rollouts are sampled with; 0 is greedy.")
    top_p: float = option(
        1.0, "Sample rollouts from the smallest set of tokens with this probability; 1 is off."
    )
    top_k: int = option(0, "Sample rollouts from this many most likely tokens; 0 is off.")
    max_completion_length: int = option(1024, "A rollout stops after this many tokens.")
    generation_batch_size: int | None = option(
        None, "Sequences generated at once; None for all rollouts of an optimizer step."
    )

    # What student and teacher read
    max_prompt_length: int = option(
        1024, "A student's prompt of more tokens is an error; nothing is truncated."
    )
    max_teacher_prompt_length: int = option(4096, "A teacher's prompt of more tokens is an error.")
    student_template: str = option(prompts.STUDENT_TEMPLATE, "The student's message, with {problem}.")
    teacher_template: str = option(
        prompts.TEACHER_TEMPLATE, "The teacher's message, with {problem} and {solution}."
    )
    context_template: str = option(
        prompts.CONTEXT_TEMPLATE,
        "The teacher's message in data with `prompt`: {prompt} and {privileged_context}.",
    )
    student_chat_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'JSON for the chat template of the student, say {"enable_thinking": false}.'},
    )
    teacher_chat_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON for the chat template of the teacher."}
    )

    # How a completion is judged
    eval_match: str = option(
        "exact",
        "A completion is right if it equals the answer (`exact`), ends in the same number (`number`), states "
        "what is mathematically the same (`math`), or if the function at an import path "
        "`package.module:function` gives it at least 1/2.",
    )
    rollouts_recorded: int = option(4, "Rollouts written to rollouts.json before and after training.")

    # Other defaults than TrainingArguments'
    max_steps: int = option(
        -1,
        "Optimizer steps, 100 unless num_train_epochs is given; self-distillation is short, and goes on too "
        "long easily.",
    )
    num_train_epochs: float = option(
        0.0, "How often every prompt is read, in place of max_steps; 0 leaves it to that."
    )
    learning_rate: float = option(5e-6, "Peak learning rate.")
    logging_steps: float = option(
        5,
        "Write metrics every so many steps, and at the first and the last one. Measuring the tokens of such "
        "a step costs half of its loss again: six products with the head instead of four.",
    )
    logging_first_step: bool = option(True, "Write metrics at the first step.")
    eval_steps: float | None = option(20, "Evaluate every so many steps, with eval_strategy `steps`.")
    save_steps: float = option(20, "Write a checkpoint every so many steps.")
    per_device_eval_batch_size: int = option(64, "Sequences generated at once in an evaluation.")
    logging_nan_inf_filter: bool = option(False, "Hide losses that are not finite from the log.")
    remove_unused_columns: bool = option(False, "Has no effect: rows are not tables here.")
    report_to: list[str] | str | None = field(
        default="none", metadata={"help": "Trackers to report to besides the run folder."}
    )
    disable_tqdm: bool | None = option(True, "The progress bar is the driver's own.")

    def __post_init__(self) -> None:
        if isinstance(self.fsdp, str) and self.fsdp.lower() in ("true", "false"):
            # As a command line and a YAML file say it; TrainingArguments takes a word for names of FSDP1.
            self.fsdp = self.fsdp.lower() == "true"  # type: ignore[assignment]
        self._settle_length()
        check_inherited(self)
        check_finite(self)
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for
        self.check_thinking()
        self.check_engine()
        self.check_served()
        self.check_watch()
        self.check_safety()
        self.check_method()
        self.check_pieces()
        self.check_supplies()
        self.to_objective()
        self.to_templates()
        self.to_teacher()
        _in_range("loss_temperature", self.loss_temperature, above=0)
        _in_range("temperature", self.temperature, least=0)
        _in_range("top_p", self.top_p, above=0, most=1)
        _in_range("top_k", self.top_k, least=0)
        for name in ("max_prompt_length", "max_teacher_prompt_length", "max_completion_length"):
            _in_range(name, getattr(self, name), least=1)
        _in_range("rollouts_recorded", self.rollouts_recorded, least=0)
        if self.generation_batch_size is not None:
            _in_range("generation_batch_size", self.generation_batch_size, least=1)

    def to_dict(self) -> dict[str, Any]:
        """What trackers are told: everything but passwords and keys."""
        return redacted(super().to_dict())

    def __str__(self) -> str:
        return redact(super().__str__())

    __repr__ = __str__

    def _settle_length(self) -> None:
        """Steps or epochs say how long a run is. ValueError for both, and for steps that there are not."""
        given = self.max_steps != -1
        _in_range("num_train_epochs", self.num_train_epochs, least=0, below=float("inf"))
        if self.num_train_epochs and (given or self.private is not None):
            other = f"max_steps {self.max_steps}" if given else "private, whose rows are drawn"
            raise ValueError(f"num_train_epochs: expected none with {other}; got {self.num_train_epochs:g}")
        if not self.num_train_epochs and not given:
            self.max_steps = 100
        if not self.num_train_epochs and self.max_steps < 1:
            raise ValueError(f"max_steps: expected a number of at least 1, got {self.max_steps}")

    def steps_for(self, prompts: int) -> int:
        """How many optimizer steps a run has that trains on so many prompts; a step ends with the epoch."""
        if not self.num_train_epochs:
            return self.max_steps
        at_once = self.per_device_train_batch_size * self.world_size
        batches, rest = divmod(prompts * self.num_generations, at_once)
        batches += bool(rest) and not self.dataloader_drop_last
        a_epoch = max(math.ceil(batches / self.gradient_accumulation_steps), 1)
        return math.ceil(self.num_train_epochs * a_epoch)

    def check_devices(self) -> None:
        """ValueError unless every process has one device, and goes with what else was asked for."""
        if self.n_gpu > 1:
            raise ValueError(
                f"args: expected one device per process, got {self.n_gpu} in one; start a process for each "
                "(accelerate launch, torchrun), or make one of them visible (CUDA_VISIBLE_DEVICES=0)"
            )
        if self.deepspeed_plugin is not None:
            check_zero(self.deepspeed_plugin, self.save_strategy != SaveStrategy.NO)
        if self.world_size == 1:
            return
        for name, alone in (("private", None), ("exposure", None), ("subnetwork", None), ("extrapolate", 0)):
            if (got := getattr(self, name)) != alone:
                raise ValueError(
                    f"{name}: expected {alone!r} with {self.world_size} processes, since it is for one; "
                    f"got {got!r}"
                )
        if self.torch_compile:
            raise ValueError(f"torch_compile: expected False with {self.world_size} processes; got True")
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                "per_device_train_batch_size: expected a multiple of num_generations "
                f"({self.num_generations}) with {self.world_size} processes, so that no group is cut; got "
                f"{self.per_device_train_batch_size}"
            )

    def to_objective(self) -> opsd_kernels.Objective:
        """The objective by its name, with what was given in place of its own settings."""
        settings = ("beta", "entry_clip", "clip_mode", "token_clip")
        given = {name: getattr(self, name) for name in settings if getattr(self, name) is not None}
        return self.over_known(dataclasses.replace(objective(self.objective), **given))

    def to_teacher(self) -> TeacherRule:
        """Which weights teach."""
        return TeacherRule(
            self.teacher,
            self.ema_decay,
            self.teacher_every,
            self.teacher_copy_every,
            self.teacher_share,
            self.teacher_model,
            self.to_served(objective(self.objective)),
        )

    def to_templates(self) -> prompts.Templates:
        """The three templates."""
        return prompts.Templates(self.student_template, self.teacher_template, self.context_template)


def _in_range(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """ValueError naming the field unless the number keeps every bound given."""
    bounds = {
        f"at least {least}": least is None or value >= least,
        f"above {above}": above is None or value > above,
        f"at most {most}": most is None or value <= most,
        f"below {below}": below is None or value < below,
    }
    broken = [bound for bound, kept in bounds.items() if not kept]
    if broken:
        raise ValueError(f"{name}: expected a number {' and '.join(broken)}, got {value}")
