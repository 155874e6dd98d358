"""The part of a run's configuration that concerns methods of the literature."""

import json
from dataclasses import dataclass, field
from typing import Any

from opsd_kernels import get_method
from opsd_kernels.methods.supplies import PIECES, supplies
from opsd_kernels.tokens import DATA
from opsd_train.evaluation.verify import Verifier, imported
from opsd_train.fields import json_object, option
from opsd_train.method import MethodRun, make_roles
from opsd_train.pieces.horizon import horizon
from opsd_train.reading.contexts import Context, context
from opsd_train.reading.prompts import Encoder
from opsd_train.reading.roles import Roles


@dataclass
class MethodConfig:
    """Options of a method; the defaults are those of no method at all."""

    method: str | None = option(
        None, "A method of the literature by name, in place of `objective`; `opsd methods` lists them."
    )
    method_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'JSON for the method\'s own options, say {"coefficient": 0.01}; '
            "`opsd methods NAME` lists them."
        },
    )
    method_schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON for options that change with the step, in place of those that do as published, say "
            '{"coefficient": {"start": 0.5, "end": 0, "steps": 30, "hold": 10}}.'
        },
    )
    contexts: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON for what each of the method's teachers reads, by role, say "
            '{"teacher": "answer_only", "plain": "plain"}.'
        },
    )
    context_templates: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "JSON for the templates of contexts, by the context's name."},
    )
    pool: list[str] | None = field(
        default=None,
        metadata={
            "help": "Contexts of the teachers whose log-probs a method compares at the sampled tokens."
        },
    )
    verifier: str | None = option(
        None,
        "What rewards a rollout: exact, number, math, reasoning_gym (the package's own score), or "
        "package.module:function; None is `eval_match`.",
    )
    annotator: str | None = option(
        None, "package.module:function that makes further columns of what is known of the rollouts."
    )
    num_generations: int = option(1, "Rollouts of each prompt in a step, a group.")
    horizon: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON for how long rollouts are at a step, say "
            '{"name": "progressive", "start": 100, "grow": 100}.'
        },
    )

    def check_method(self) -> None:
        """ValueError naming the option that is wrong."""
        for name in ("method_options", "method_schedule", "contexts", "context_templates", "horizon"):
            setattr(self, name, json_object(name, getattr(self, name) or {}))
        for name, spec in dict(self.method_schedule or {}).items():  # type: ignore[arg-type]
            given = set(spec) if isinstance(spec, dict) else set()
            if not {"start", "end", "steps"} <= given <= {"start", "end", "steps", "hold"}:
                raise ValueError(
                    f"method_schedule: expected start, end, steps and perhaps hold for {name!r}; got {spec!r}"
                )
        if self.num_generations < 1:
            raise ValueError(f"num_generations: expected at least 1, got {self.num_generations}")
        if self.horizon:
            horizon[self._horizon["name"]]
        for name in self._templates:
            context[name]
        if self.method is None:
            self._without_method()
        else:
            self._without_objective()
            get_method(self.method).recipe(**self._options)
        Verifier.named(self._verifier_name)

    def check_supplies(self) -> None:
        """ValueError unless the run has what makes the method's loss the method's; says how to supply it."""
        if self.method is None:
            return
        found = supplies(self.method, **self._options)
        if found.library:
            alone = get_method(self.method).alone
            hint = "" if alone is None else f", or --method-options '{json.dumps(dict(alone))}' without them"
            raise ValueError(
                f"method: expected one for which the driver has everything; {self.method!r} is for the "
                f"library only (opsd_kernels.loss(..., objective={self.method!r}){hint}): it needs "
                f"{found.library}, which the driver does not have"
            )
        for name in found.pieces:
            # A mapping without entries takes the defaults.
            if getattr(self, name) in (None, 0):
                raise ValueError(
                    f"{name}: expected {PIECES[name]} with method {self.method!r}, which is another one "
                    "without it; got none"
                )
        for name in found.annotated if self.annotator is None else ():
            raise ValueError(
                f"annotator: expected a function that makes the column {name!r} ({DATA[name][1]}), which "
                f"method {self.method!r} reads; got none"
            )
        if found.pooled and not self.pool and self.annotator is None:
            raise ValueError(
                f"pool: expected the contexts whose teachers method {self.method!r} compares; got none"
            )

    def longest(self, step: int, most: int) -> int:
        """Tokens that a rollout may have at an optimizer step, at most `most`."""
        if not self.horizon:
            return most
        options = {name: value for name, value in self._horizon.items() if name != "name"}
        return horizon[self._horizon["name"]](step, most, **options)

    def to_method(self, encoder: Encoder) -> MethodRun | None:
        """What the method needs of its rollouts; None without a method."""
        if self.method is None:
            return None
        pool = tuple(self.pool or ())
        run = MethodRun(
            key=self.method,
            options=self._options,
            schedules=self.schedules,
            pool=pool,
            encoder=encoder,
            verifier=Verifier.named(self._verifier_name),
            annotate=None if self.annotator is None else imported("annotator", self.annotator),
            by_turn=getattr(self, "turns", None) is not None,
        )
        if getattr(self, "offline", None) is not None:
            # The prompts of a cache say what its teacher read.
            return run.with_roles(Roles({"teacher": Context("plain")}))
        contexts = dict(self.contexts or {})  # type: ignore[arg-type]
        other_model = getattr(self, "teacher", "initial") == "model"
        run = run.with_roles(make_roles(run, contexts, self._templates, other_model))
        self._check_groups(run)
        return run

    @property
    def schedules(self) -> dict[str, Any]:
        """Options that change with the step: the run's, and as published those that it says nothing of."""
        if self.method is None:
            return {}
        published = get_method(self.method).schedule
        own = {name: spec for name, spec in published.items() if name not in self._options}
        return own | dict(self.method_schedule or {})  # type: ignore[arg-type]

    @property
    def _options(self) -> dict[str, Any]:
        return dict(self.method_options or {})  # type: ignore[arg-type]

    @property
    def _templates(self) -> dict[str, str]:
        named = {"full_solution": "teacher_template", "privileged_context": "context_template"}
        own = {name: getattr(self, field) for name, field in named.items() if hasattr(self, field)}
        return own | dict(self.context_templates or {})  # type: ignore[arg-type]

    @property
    def _horizon(self) -> dict[str, Any]:
        return {"name": "full", **dict(self.horizon or {})}  # type: ignore[arg-type]

    @property
    def _verifier_name(self) -> str:
        return self.verifier or str(getattr(self, "eval_match"))  # noqa: B009

    def _check_groups(self, run: MethodRun) -> None:
        """ValueError where a method that compares the rollouts of a prompt would not have them."""
        part, count = int(getattr(self, "per_device_train_batch_size")), self.num_generations  # noqa: B009
        whole = part * int(getattr(self, "gradient_accumulation_steps"))  # noqa: B009
        if whole % count:
            raise ValueError(
                f"num_generations: expected a divisor of the {whole} rollouts of a step, so that no group is "
                f"cut; got {count}"
            )
        if "group" in run.needs and part % count:
            raise ValueError(
                f"per_device_train_batch_size: expected a multiple of num_generations ({count}) for method "
                f"{run.key!r}, whose weights compare the rollouts of a prompt; got {part}"
            )
        made = "advantage" in run.needs and run.annotate is None
        if count == 1 and (made or run.roles.needs_siblings):
            raise ValueError(
                f"num_generations: expected at least 2 for method {run.key!r}, which compares the rollouts "
                "of a prompt; got 1"
            )

    def _without_objective(self) -> None:
        """ValueError for settings of the objective, in whose place the method stands."""
        known = list(get_method(str(self.method)).options)
        for name in ("beta", "entry_clip", "clip_mode", "token_clip"):
            if (given := getattr(self, name, None)) is not None:
                hint = " (it is one of method_options)" if name in known else ""
                raise ValueError(f"{name}: expected nothing with a method{hint}; got {given!r}")
        if (given := getattr(self, "objective", "forward_kl")) != "forward_kl":
            raise ValueError(f"objective: expected nothing with a method; got {given!r}")

    def _without_method(self) -> None:
        for name in ("method_options", "method_schedule", "contexts", "pool", "annotator"):
            if getattr(self, name):
                raise ValueError(f"{name}: expected nothing without a method; got {getattr(self, name)!r}")
        if self.context_templates:
            raise ValueError(
                "context_templates: without --method, the teacher's text is set by --teacher-template "
                "(problem and solution) or --context-template (prompt and privileged_context)"
            )
