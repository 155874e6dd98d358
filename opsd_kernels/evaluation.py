"""How a recipe is evaluated: teachers from roles, weights from the batch, then one walk of the engine."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import reductions, rollout_data, source_checks, validation
from opsd_kernels.call import Call, checked_weights
from opsd_kernels.combination import Combination, Estimate, Factor, made_weight
from opsd_kernels.composite_call import CompositeCall
from opsd_kernels.engine.parts import Dense, Gather, Parts
from opsd_kernels.known import Sampled, TopK
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.options import LossOptions, SourceLike, TokenStats
from opsd_kernels.preparers import prepare
from opsd_kernels.recipes import Blend, Built, Estimator, Recipe, Role, Term
from opsd_kernels.roles import TeacherArgument, named_roles
from opsd_kernels.sources import LogLinear, Mixture, Several, Source, Target, Teacher
from opsd_kernels.tokens import Batch
from opsd_kernels.weights import LOCAL

KNOWS_TEACHER = ("forward_kl", "reverse_kl", "jsd", "teacher_entropy", "top1_agreement", "clipped_fraction")


@dataclass(frozen=True)
class Evaluation:
    """A recipe's call: checked sources by role, the batch, and the caller's options.

    Args:
        recipe: the terms.
        student: the student's source.
        roles: the teachers by name.
        options: the caller's.
        data: the columns of `DATA`, as `rollout_data.check_data` returns them.
    """

    recipe: Recipe
    student: Source
    roles: Mapping[str, Teacher | Sampled]
    options: LossOptions
    data: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, student: SourceLike, teacher: TeacherArgument, weight: Tensor | None, recipe: Recipe,
        options: LossOptions,
    ) -> "Evaluation":  # fmt: skip
        """Checks the arguments that a single divergence does not have; the rest is checked by `Call`."""
        s = source_checks.as_source("student", student, weight)
        validation.check_tokens(options, s)
        roles = named_roles(teacher, recipe, weight, s, options)
        if weight is not None:
            bare = [student, *(teacher.values() if isinstance(teacher, Mapping) else [teacher])]
            source_checks.check_weight_is_used(bare, weight)
        data = rollout_data.check_data(options.data, s.lead, s.tensors[0].device)
        rollout_data.check_log_probs(data, options.mask, options.rows)
        return cls(recipe, s, roles, options, data)

    def loss(self) -> Tensor:
        """The reduced loss."""
        terms, teachers = self.recipe.terms, self.teachers
        if len(terms) == 1 and isinstance(terms[0].loss, Objective) and not self._local(terms[0]):
            return self._single(terms[0], terms[0].loss)
        combination, parts = self._combination()
        several = teachers[0] if len(teachers) == 1 else Several(teachers)
        call = CompositeCall.of(
            self.student, several, self._first_objective, parts, combination, self.options
        )
        if self._walks_once:
            return call.weighted_sum()
        tokens = call.tokens(self._batch).reshape(self.student.lead)
        if self.options.reduction == "none":
            return tokens
        return tokens.sum(-1) if self.options.reduction == "sequences" else tokens.sum()

    def stats(self) -> TokenStats:
        """Token statistics against the first teacher, in the shape of the token dimensions."""
        return TokenStats(*[column.reshape(self.student.lead) for column in self._batch.stats])

    @property
    def _walks_once(self) -> bool:
        """Whether the gradient is formed in the forward: no sequence is looked at as a whole afterwards."""
        reduced = self.options.reduction in ("mean", "sum", "sequence_mean")
        eager = not torch.compiler.is_compiling()
        return reduced and eager and self.options.backend != "reference"

    @cached_property
    def teachers(self) -> list[Teacher]:
        """Each different teacher of the terms once."""
        return [self._teacher(spec) for spec in self._specs]

    @cached_property
    def _specs(self) -> list[Role]:
        found: list[Role] = []
        for term in self.recipe.terms:
            spec = term.teacher
            if spec is not None and spec not in found and not self._is_sampled(spec):
                found.append(spec)
        return found

    @cached_property
    def _mask(self) -> Tensor:
        """`[B, C]` bool: the live tokens."""
        lead, options = self.student.lead, self.options
        shape = rollout_data.by_sequence(lead)
        device = self.student.tensors[0].device
        if options.rows is not None:
            live = torch.zeros(lead.numel(), dtype=torch.bool, device=device)
            return live.index_fill(0, options.rows.long(), True).reshape(shape)
        if options.mask is None:
            return torch.ones(shape, dtype=torch.bool, device=device)
        return options.mask.reshape(shape)

    @cached_property
    def _batch(self) -> Batch:
        """What the weights see, with the recipe's own columns."""
        batch = Batch(self._mask, self.data, cache(self._measure))
        for spec in self.recipe.prepare:
            batch = replace(batch, data={**batch.data, **prepare[spec.name](batch, **spec.options)})
        return batch

    @torch.no_grad()
    def _measure(self) -> TokenStats:
        """`[B, C]` statistics; without a teacher that has logits, those of the student alone."""
        options = self.options
        teacher = self.teachers[0] if self._specs else _detached(self.student)
        support = self._first_objective.support
        given = support is not None and support.of == "given" and not isinstance(teacher, TopK)
        asked = LossOptions(
            objective=self._first_objective, mask=options.mask, rows=options.rows,
            token_ids=options.token_ids, support_ids=options.support_ids if given else None,
            temperature=options.temperature,
            vocab_size=options.vocab_size, workspace_bytes=options.workspace_bytes, backend=options.backend,
        )  # fmt: skip
        call = Call.of(self.student, teacher, None, asked)
        found = call.stats(call.token_stats())
        if not self._specs:
            nothing = torch.where(self._mask.reshape(found.jsd.shape), torch.nan, 0.0).to(found.jsd)
            sampled = [source.logprob for source in self.roles.values() if isinstance(source, Sampled)]
            logprob = nothing if not sampled else sampled[0].to(nothing).where(nothing.isnan(), 0.0)
            found = found._replace(
                **dict.fromkeys(KNOWS_TEACHER, nothing), teacher_logprob=logprob.expand_as(nothing)
            )
        return TokenStats(*[column.reshape(self._mask.shape) for column in found])

    @property
    def _first_objective(self) -> Objective:
        """A divergence to the first teacher, by which calls of the engine are checked."""
        for term in self.recipe.terms:
            if isinstance(term.loss, Objective) and term.teacher in self._specs[:1]:
                return term.loss
        known = bool(self._specs) and isinstance(self.teachers[0], TopK)
        return Objective("forward_kl", support=Support(None, "given") if known else None)

    def _single(self, term: Term, objective: Objective) -> Tensor:
        """One divergence, whose weights are known: the engine's own walk."""
        teacher = self.teachers[self._index(term) or 0]
        factor = self._factor(term).fixed.reshape(self.student.lead)
        reduction = "none" if self.options.reduction in ("none", "sequences") else "sum"
        options = replace(
            self.options, objective=objective, token_weight=factor, reduction=reduction, denominator=None,
            data=None,
        )  # fmt: skip
        found = Call.of(self.student, teacher, None, options).evaluate(with_stats=False)[0]
        return found.sum(-1) if self.options.reduction == "sequences" else found

    def _combination(self) -> tuple[Combination, Parts]:
        """The terms as the engine's parts, and how their values make the loss."""
        dense: list[Dense] = []
        factors: list[Factor] = []
        gathers: list[Gather] = []
        estimates: list[Estimate] = []
        for term in self.recipe.terms:
            factor, teacher = self._factor(term), self._index(term)
            if not isinstance(term.loss, Estimator):
                objective = term.loss if isinstance(term.loss, Objective) else None
                dense.append(Dense(objective, teacher or 0))
                factors.append(factor)
                continue
            gather = Gather(term.loss.support, teacher)
            if gather not in gathers:
                gathers.append(gather)
            baseline = None
            if term.loss.baseline is not None:
                baseline = len(dense)
                dense.append(Dense(term.loss.baseline, teacher or 0, constant=True))
                factors.append(Factor(torch.zeros_like(factor.fixed)))
            estimates.append(
                Estimate(term.loss, factor, gathers.index(gather), baseline, self._sampled(term.teacher))
            )
        columns = rollout_data.by_token(self._batch.data, self._mask.shape[1])
        return Combination(factors, estimates, columns), Parts(tuple(dense), tuple(gathers))

    def _index(self, term: Term) -> int | None:
        """Which of the teachers a term has; None for one that is known at the sampled token alone."""
        if term.teacher is None:
            return None
        if not self._is_sampled(term.teacher):
            return self._specs.index(term.teacher)
        needs_logits = not isinstance(term.loss, Estimator) or term.loss.support or term.loss.baseline
        if needs_logits:
            raise ValueError(
                f"{term.teacher}: expected a teacher with logits for a divergence; got Sampled log-probs"
            )
        return None

    def _local(self, term: Term) -> tuple[Any, ...]:
        """The term's weights that can be made inside a chunk, of statistics against the first teacher."""
        by_count = term.normaliser in ("tokens", "sequences")
        if not by_count or not self._specs or not self._walks_once:
            return ()
        return tuple(spec for spec in term.weights if spec.name in LOCAL)

    def _factor(self, term: Term) -> Factor:
        """coefficient * weights / divisor of every token, `[N]`; 0 where it does not count."""
        options, mask = self.options, self._mask
        local = self._local(term)
        w = torch.ones(mask.shape, dtype=torch.float64, device=mask.device)
        for spec in term.weights:
            if spec not in local:
                w = w * made_weight(spec, self._batch)
        count, exact = self._denominator(term)
        by = reductions.divisor(w, mask, term.normaliser, options.reduction, count, exact)
        w = w * term.coefficient / by
        if options.token_weight is not None:
            outer = options.token_weight
            if callable(outer):
                outer = checked_weights(outer, self._batch.stats, mask)
            w = w * outer.reshape(mask.shape)
        fixed = torch.where(mask, w, 0.0).flatten()
        dtype = torch.float64 if self.student.tensors[0].dtype == torch.float64 else torch.float32
        return Factor(fixed.to(dtype), local)

    def _denominator(self, term: Term) -> tuple[reductions.Denominator, bool]:
        """The caller's count of what the term is divided by, and whether it is the term's own."""
        given = self.options.denominator
        if not isinstance(given, Mapping):
            return given, False
        own = given.get(f"term {self.recipe.terms.index(term)}")
        if own is not None:
            return own, True
        by_sequence = term.normaliser in reductions.BY_SEQUENCE or self.options.reduction == "sequence_mean"
        return given.get("sequences" if by_sequence else "tokens"), False

    def _is_sampled(self, spec: Role) -> bool:
        return isinstance(spec, str) and isinstance(self.roles.get(spec), Sampled)

    def _sampled(self, spec: Role | None) -> Tensor | None:
        """`[N]` log-probs of a teacher that is known at the sampled tokens only."""
        source = self.roles.get(spec) if isinstance(spec, str) else None
        return source.logprob.reshape(-1) if isinstance(source, Sampled) else None

    def _teacher(self, spec: Role) -> Teacher:
        """The source of a term's teacher."""
        if isinstance(spec, Built):
            return Target(spec.name, [self._role(name) for name in spec.roles], dict(spec.options))
        if isinstance(spec, Blend):
            streams = [(self._coefficient(factor), self._role(name)) for factor, name in spec.streams]
            return LogLinear(streams) if spec.kind == "loglinear" else Mixture(streams)
        return self._role(spec)

    def _role(self, name: str) -> Any:
        if name == "student":
            return _detached(self.student)
        source = self.roles[name]
        if isinstance(source, Sampled):
            raise ValueError(
                f"{name}: expected a teacher with logits to build a target; got Sampled log-probs"
            )
        return source

    def _coefficient(self, factor: float | str) -> float | Tensor:
        if not isinstance(factor, str):
            return factor
        column = self._batch.per_token(factor.removeprefix("1-")).expand(self._mask.shape)
        column = column.reshape(self.student.lead).to(self.student.tensors[0].dtype)
        return 1 - column if factor.startswith("1-") else column


def _detached(source: Source) -> Source:
    return source.with_tensors([tensor.detach() for tensor in source.tensors])
