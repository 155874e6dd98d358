"""Recipes: a token loss of several terms, said in data. `methods/` has those of the literature."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from opsd_kernels.checks import is_finite, shown
from opsd_kernels.estimators import check_estimator
from opsd_kernels.objectives import Objective, Support
from opsd_kernels.preparers import prepare
from opsd_kernels.targets import target
from opsd_kernels.weights import weight

Options: TypeAlias = Mapping[str, Any]
# How the sum over the live tokens is divided under reduction "mean", if the caller gives no denominator.
NORMALISERS = ("tokens", "sequences", "weights", "selected", "sequence_weights", "sequence_selected")


@dataclass(frozen=True)
class Estimator:
    """A token loss made of log-probabilities of the sampled token, or of the K entries of a support.

    Args:
        name: of a function of `estimators.py`.
        options: its options.
        support: the entries; None for the sampled token. What `rest` says does not matter here: an estimator
            sees log-probabilities of the whole softmax.
        baseline: a divergence between the same student and teacher whose value, as a constant, the function
            sees beside them.
    """

    name: str
    options: Options = field(default_factory=dict)
    support: Support | None = None
    baseline: Objective | None = None

    def __post_init__(self) -> None:
        check_estimator(self.name, self.options)


@dataclass(frozen=True)
class Entropy:
    """-H(s) of every token, to be minimised: a bonus of entropy. A negative coefficient sharpens instead."""


@dataclass(frozen=True)
class Weight:
    """A constant factor of each token's loss, made by a function of `weights.py`.

    Args:
        name: of the function.
        options: its options.
    """

    name: str
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        weight.check(self.name, self.options)


@dataclass(frozen=True)
class Prepare:
    """Further columns of `data`, made by a function of `preparers.py` before any weight is.

    Args:
        name: of the function.
        options: its options.
    """

    name: str
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        prepare.check(self.name, self.options)


@dataclass(frozen=True)
class Blend:
    """A teacher combined of several roles: `LogLinear` or `Mixture`.

    Args:
        kind: `"loglinear"` or `"mixture"`.
        streams: pairs (factor, role). A factor is a number; or the name of a column of `data`, of which
            `"1-name"` is the complement; the role `"student"` is the detached student.
    """

    kind: str
    streams: tuple[tuple[float | str, str], ...]

    def __post_init__(self) -> None:
        if self.kind not in ("loglinear", "mixture"):
            raise ValueError(f"kind: expected 'loglinear' or 'mixture'; got {self.kind!r}")


@dataclass(frozen=True)
class Built:
    """A teacher that a function of `targets.py` builds from several roles.

    Args:
        name: of the function.
        roles: its sources, in its order.
        options: its options.
    """

    name: str
    roles: tuple[str, ...]
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        target.check(self.name, self.options, given=1 + len(self.roles))


Role: TypeAlias = str | Blend | Built


@dataclass(frozen=True)
class Term:
    """coefficient * weights * loss, summed over the live tokens and divided.

    Args:
        loss: the token loss.
        coefficient: a factor of the term.
        teacher: the name of a teacher, a combination of several, or None if the loss has none.
        weights: constant factors of each token, multiplied.
        normaliser: what the sum is divided by under reduction "mean": the live `"tokens"`; for each sequence
            its live tokens, and then the `"sequences"` that have any; the sum of the `"weights"`; the tokens
            `"selected"` by weights other than 0; or `"sequence_weights"`, for each sequence the sum of its
            weights, and then the sequences where that is not 0; or `"sequence_selected"`, the same with the
            number of its selected tokens.
    """

    loss: Objective | Estimator | Entropy
    coefficient: float = 1.0
    teacher: Role | None = "teacher"
    weights: tuple[Weight, ...] = ()
    normaliser: str = "tokens"

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Objective | Estimator | Entropy):
            raise ValueError(f"loss: expected an Objective, an Estimator or Entropy(); got {self.loss!r}")
        if not is_finite(self.coefficient):
            raise ValueError(f"coefficient: expected a finite number; got {shown(self.coefficient)}")
        if not isinstance(self.weights, tuple) or not all(isinstance(x, Weight) for x in self.weights):
            raise ValueError(f"weights: expected a tuple of Weight(name, options); got {self.weights!r}")
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"normaliser: expected one of {', '.join(NORMALISERS)}; got {self.normaliser!r}")
        if isinstance(self.loss, Objective) and self.teacher is None:
            raise ValueError("teacher: expected one for a divergence; got None")


@dataclass(frozen=True)
class Recipe:
    """The sum of its terms; every term's gradient goes through the same backward.

    Args:
        terms: at least one.
        prepare: what is computed from `data` and statistics first, in this order.
    """

    terms: tuple[Term, ...]
    prepare: tuple[Prepare, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.terms, tuple) or not all(isinstance(x, Term) for x in self.terms):
            raise ValueError(f"terms: expected a tuple of Term; got {self.terms!r}")
        if not self.terms:
            raise ValueError("terms: expected at least one; got none")

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the teachers that a call has to give, in the order of their first use."""
        found: dict[str, None] = {}
        for term in self.terms:
            found |= dict.fromkeys(_roles(term.teacher))
        found.pop("student", None)
        return tuple(found)


def _roles(teacher: Role | None) -> tuple[str, ...]:
    if teacher is None:
        return ()
    if isinstance(teacher, Blend):
        return tuple(role for _, role in teacher.streams)
    return teacher.roles if isinstance(teacher, Built) else (teacher,)
