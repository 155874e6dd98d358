"""A method of the literature in the driver: what its loss reads beside student and teacher."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import Recipe, get_method
from opsd_kernels.denominators import denominators
from opsd_kernels.methods.needs import columns as columns_of
from opsd_kernels.schedules import linear
from opsd_kernels.tokens import DATA
from opsd_train.data.columns import Step, cut, padded, row_of, step_column
from opsd_train.data.rows import Row
from opsd_train.evaluation.verify import Verifier
from opsd_train.reading.context_templates import FALLBACKS, STEPS
from opsd_train.reading.contexts import Attempt, Context
from opsd_train.reading.pool import score_pool
from opsd_train.reading.prompts import Encoder, decode
from opsd_train.reading.roles import Roles, can_tell, collate_role
from opsd_train.reading.thoughts import Thoughts
from opsd_train.rollouts import Rollout, collate, counted

# Roles that the initial weights read, whatever the teacher's rule.
FROZEN = ("reference", "base", "initial")
# What a role reads unless the run says otherwise; `None` is what the method names first.
CONTEXTS: dict[str, str | dict[str, Any] | None] = {
    "teacher": None,
    "privileged": None,
    "initial": None,
    "plain": "plain",
    "reference": "plain",
    "base": "plain",
    "context_only": {"name": "full_solution", "template": "{solution}"},
    "wrong": "wrong_answer",
    "view1": "full_solution",
    "view2": {"name": "partial_solution", "template": STEPS},
    "view3": "answer_only",
}
# Columns that are log-probs of the sampled tokens under another reader, and that reader's role.
SCORED = {"reference_logprob": "reference", "negative_logprob": "wrong"}
POOL = ("teacher_logprobs", "teacher_weight")
OWN = ("old_logprob", "rollout_logprob")

Annotator = Callable[[Sequence[str], Sequence[Mapping[str, Any]], Sequence[float]], Mapping[str, Any]]


@dataclass(frozen=True)
class MethodRun:
    """What a run with a method needs of its rollouts.

    Args:
        key: the method.
        options: of the method, in place of the published ones.
        schedules: option -> the arguments of `schedules.linear`, by which it changes with the step.
        pool: roles whose log-probs of the sampled tokens make the column `teacher_logprobs`.
        encoder: tokenises what they read.
        verifier: gives rewards.
        annotate: a user's function that makes further columns, or None.
        roles: which context each teacher reads.
        by_turn: whether the annotator has to make the column `turn`.
    """

    key: str
    options: Mapping[str, Any]
    schedules: Mapping[str, Mapping[str, Any]]
    pool: tuple[str, ...]
    encoder: Encoder
    verifier: Verifier
    annotate: Annotator | None = None
    roles: Roles = field(default_factory=lambda: Roles({}))
    by_turn: bool = False

    def with_roles(self, roles: Roles) -> "MethodRun":
        """The same with what its teachers read."""
        return replace(self, roles=roles)

    def recipe(self, step: int = 0) -> Recipe:
        """What is minimised at an optimizer step, counted from 0."""
        moved = {name: linear(step, **spec) for name, spec in self.schedules.items()}
        return get_method(self.key).recipe(**{**self.options, **moved})

    @cached_property
    def thoughts(self) -> Thoughts:
        """How the student's thoughts are told from what it says."""
        return Thoughts.of(self.encoder.tokenizer, self.encoder.student_chat_kwargs)

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Columns of data that the loss asks for at any step."""
        return _united(columns_of(recipe) for recipe in self._recipes)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """The teachers that the loss has at any step."""
        return _united(recipe.roles for recipe in self._recipes)

    @property
    def _recipes(self) -> list[Recipe]:
        """One of each kind there is: an option may end, or begin, at a value that leaves a term out."""
        ends = [spec.get("hold", 0) + spec.get("steps", 1) for spec in self.schedules.values()]
        return [self.recipe(step) for step in sorted({0, *(max(end - 1, 0) for end in ends), *ends})]

    @property
    def rewarded(self) -> bool:
        """Whether rollouts are judged."""
        return self.roles.on_policy or any(name in ("reward", "correct", "advantage") for name in self.needs)

    def check(self, rows: Sequence[Row]) -> None:
        """ValueError for rows that the method cannot use.

        A context tells nothing in any of them, whatever the rollouts are, or nothing that the chat template
        writes; one that is made of columns breaks its budget; or the verifier does not judge one.
        """
        if self.rewarded:
            for row in rows:
                self.verifier.check_row(row)
        contexts = {role: context for role, context in self.roles.contexts.items() if not context.on_policy}
        readings = Roles(contexts).read(rows, self.encoder)
        for role, context in self.roles.contexts.items():
            told = any(readings[role].privileged) if role in readings else can_tell(context, rows)
            if not told:
                held = ", ".join(rows[0].columns)
                raise ValueError(
                    f"data: expected rows from which the context {context.name!r} can tell the role "
                    f"{role!r} of method {self.key!r} something; got the columns {held}"
                )

    def step(self, rollouts: Sequence[Rollout]) -> Step:
        """Judges the rollouts and lets every role read what it may."""
        tokenizer = self.encoder.tokenizer
        texts = [decode(tokenizer, one.completion, skip_special_tokens=True) for one in rollouts]
        prompts = [one.prompt for one in rollouts]
        rewards = self.verifier.rewards(texts, prompts) if self.rewarded or self.annotate else []
        attempts = (
            [
                Attempt(text, reward, self.thoughts.left_out(one.completion))
                for text, reward, one in zip(texts, rewards, rollouts, strict=True)
            ]
            if rewards
            else None
        )
        readings = self.roles.read([row_of(one) for one in rollouts], self.encoder, attempts)
        return Step(rollouts, rewards, readings, tokenizer)

    def columns(self, step: Step) -> dict[str, Tensor]:
        """The columns that are made of the rollouts of a step, [R] or [R, C].

        Raises:
            ValueError: the method asks for a column that neither the driver nor the annotator makes.
        """
        made = self._annotated(step)
        if self.by_turn and "turn" not in made:
            raise ValueError("turns: expected an annotator that makes the column 'turn'; got one without it")
        for name in self.needs:
            if name in made or name in SCORED or name in POOL or name in OWN:
                continue
            if name not in step_column.functions:
                raise ValueError(
                    f"annotator: expected a function that makes the column {name!r} ({DATA[name][1]}), which "
                    f"method {self.key!r} reads; got none"
                )
            made[name] = step_column[name](step)
        return made

    def collate(
        self, step: Step, columns: Mapping[str, Tensor], part: slice, pad_id: int
    ) -> dict[str, Tensor]:
        """The batch of some rollouts of a step: `collate`'s, every role's prompts, and `data_` columns."""
        chosen = list(step.rollouts[part])
        batch = collate(chosen, pad_id)
        completions = [one.completion for one in chosen]
        for role, reading in step.readings.items():
            batch |= collate_role(role, reading.ids[part], completions, pad_id)
            batch[f"{role}_privileged"] = torch.tensor(reading.privileged[part])
        if "engine_logprobs" in batch and "rollout_logprob" in self.needs:
            batch["data_rollout_logprob"] = batch["engine_logprobs"]
        length = batch["completion_mask"].shape[1]
        return batch | {f"data_{name}": cut(column[part], length) for name, column in columns.items()}

    def denominators(
        self, step: int, whole: Mapping[str, Tensor], total: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """What the loss of every part of a step is divided by, as `count_` columns of its batch.

        `total` sums over all processes, of whose rollouts `whole` has a share.
        """
        data = {name.removeprefix("data_"): x for name, x in whole.items() if name.startswith("data_")}
        found = denominators(self.recipe(step), counted(whole), data, total)
        return {f"count_{name}": count for name, count in found.items()}

    def scored(
        self, batch: Mapping[str, Tensor], score: Callable[[str], Tensor], own: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """The data of a batch, with the columns that models make.

        Args:
            batch: as `collate` made it.
            score: gives the log-probs `[B, C]` of the sampled tokens as a role reads them.
            own: the student's own.
        """
        found = {name.removeprefix("data_"): x for name, x in batch.items() if name.startswith("data_")}
        for name in self.needs:
            if name in SCORED:
                found[name] = self._scored(SCORED[name], batch, score)
            elif name in OWN and name not in found:
                found[name] = own()
        if any(name in POOL for name in self.needs):
            heard = {role: batch[f"{role}_privileged"] for role in self.pool}
            found = {**score_pool(self.pool, score, heard), **found}
        return found

    def _scored(self, role: str, batch: Mapping[str, Tensor], score: Callable[[str], Tensor]) -> Tensor:
        """The log-probs of a role; of the wrong one the teacher's own in rows that tell it nothing."""
        found = score(role)
        if role != "wrong" or "teacher" not in self.readers:
            return found
        told = batch["wrong_privileged"].bool() & batch["teacher_privileged"].bool()
        return found if bool(told.all()) else torch.where(told[:, None], found, score("teacher"))

    def _annotated(self, step: Step) -> dict[str, Tensor]:
        if self.annotate is None:
            return {}
        tokenizer = self.encoder.tokenizer
        texts = [decode(tokenizer, one.completion, skip_special_tokens=True) for one in step.rollouts]
        rows = [row_of(one).columns for one in step.rollouts]
        longest = max(len(one.completion) for one in step.rollouts)
        return {
            name: padded(name, values, longest)
            for name, values in self.annotate(texts, rows, step.rewards).items()
        }


def make_roles(
    run: MethodRun, given: Mapping[str, Any], templates: Mapping[str, str], other_model: bool = False
) -> Roles:
    """The context of every role that the loss or its columns read.

    A method that names no context has a teacher that reads the solution, or what the student reads if it is
    another model.

    Raises ValueError for a role of which neither the run nor the table says what it reads, or that the method
    does not have.
    """
    driver = get_method(run.key).driver
    named = [word.removeprefix("context ") for word in driver if word.startswith("context ")]
    scored = [SCORED[name] for name in run.needs if name in SCORED]
    own = run.readers
    wanted = list(dict.fromkeys([*own, *scored, *run.pool])) or ["teacher"]
    # A method with several teachers names their contexts in the order of its roles, or one for them all.
    by_order = dict(zip(own, named if len(named) == len(own) else named[:1] * len(own), strict=False))
    for role in given:
        if role not in wanted:
            raise ValueError(f"contexts: expected roles among {', '.join(wanted)}; got {role!r}")
    found: dict[str, Context] = {}
    wrong = next((name for name in named if name.startswith("wrong_")), CONTEXTS["wrong"])
    defaults = {**CONTEXTS, "wrong": wrong}
    for role in wanted:
        spec = given.get(
            role, defaults.get(role, role if role in run.pool else by_order.get(role, "missing"))
        )
        if spec == "missing":
            raise ValueError(
                f"contexts: expected what the role {role!r} of method {run.key!r} reads (it has "
                f"{', '.join(wanted)}); got none"
            )
        if spec is None:
            spec = named[0] if named else "plain" if other_model or not own else "full_solution"
        options = {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "name"}
        name = spec if isinstance(spec, str) else str(spec["name"])
        if name in templates and "template" not in options:
            options["template"] = templates[name]
        fallbacks = FALLBACKS.get(name, {})
        options |= {k: templates[of] for k, of in fallbacks.items() if of in templates and k not in options}
        found[role] = Context(name, options)
    _check_different({role: found[role] for role in own if role not in FROZEN})
    return Roles(found)


def _check_different(contexts: Mapping[str, Context]) -> None:
    """Two teachers of the same weights that read the same are one."""
    for (first, one), (second, other) in itertools.combinations(contexts.items(), 2):
        if one == other:
            raise ValueError(
                f"contexts: expected the roles {first!r} and {second!r} to read different contexts; got "
                f"{one.name!r} for both"
            )


def _united(groups: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Every name once, in the order of their first use."""
    return tuple(dict.fromkeys(name for group in groups for name in group))
