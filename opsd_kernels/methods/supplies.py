"""What a method needs beside its loss, and in which of three states it stands for who trains with it."""

from dataclasses import dataclass
from typing import Any

from opsd_kernels.methods.needs import columns
from opsd_kernels.methods.registry import get_method

PUBLISHED = "runs as published"
NAMED = "runs with the columns it names"
LIBRARY = "library only"
# Pieces that an option of the driver of the same name switches on, and what to give it.
PIECES = {
    "private": "--private '{}'",
    "exposure": "--exposure '{}'",
    "extrapolate": "--extrapolate 64",
    "subnetwork": "--subnetwork RUN",
    "offline": "--offline CACHE, a folder that `opsd cache` wrote",
    "turns": "--turns '{}'",
}
# Columns of the rollouts that the driver makes itself. It has a `turn` too, which is 0 everywhere.
MADE = (
    "reward", "correct", "group", "advantage", "privileged", "span", "old_logprob", "rollout_logprob",
    "reference_logprob", "negative_logprob",
)  # fmt: skip
# Log-probs of several teachers at the sampled tokens, whose contexts the option `pool` names.
POOLED = ("teacher_logprobs", "teacher_weight")
# Contexts that read the data's column of their name.
TOLD = ("rubric", "feedback", "skill", "hint", "follow_up", "debate", "critique")


@dataclass(frozen=True)
class Supplies:
    """What must be supplied for a method's loss to be the method's.

    Args:
        pieces: options of the driver that have to be on, of `PIECES`.
        annotated: columns of `DATA` that a function of the caller makes from the rollouts.
        pooled: whether several contexts are compared at the sampled tokens.
        grouped: whether a prompt has several rollouts, which are compared.
        told: columns of the data that its contexts read, of which a method with several needs one or more.
        library: what nothing in the driver supplies; empty if all can be.
    """

    pieces: tuple[str, ...]
    annotated: tuple[str, ...]
    pooled: bool
    grouped: bool
    told: tuple[str, ...]
    library: str

    @property
    def state(self) -> str:
        """One of `PUBLISHED`, `NAMED` and `LIBRARY`."""
        if self.library:
            return LIBRARY
        return NAMED if self.annotated or self.told else PUBLISHED

    @property
    def words(self) -> tuple[str, ...]:
        """All of them as text, for tables."""
        if self.library:
            return (self.library,)
        found = [PIECES[name] for name in self.pieces]
        found += [f"--annotator for `{name}`" for name in self.annotated]
        found += ["--pool"] * self.pooled + ["--num-generations above 1"] * self.grouped
        return (*found, *(f"data column `{name}`" for name in self.told))


def supplies(key: str, **options: Any) -> Supplies:
    """What a method with some options needs; of columns and teachers this is found from its recipe.

    Raises:
        ValueError: a method or an option that does not exist.
    """
    method = get_method(key)
    needs = columns(method.recipe(**options))
    alone = method.alone is not None and method.alone.items() <= options.items()
    contexts = [word.removeprefix("context ") for word in method.driver if word.startswith("context ")]
    # A sibling stands in place of what a column tells, where both are named.
    own = "sibling" in contexts
    return Supplies(
        pieces=tuple(name for name in PIECES if name in method.driver),
        annotated=tuple(name for name in needs if name not in (*MADE, *POOLED)),
        pooled=any(name in POOLED for name in needs),
        grouped=own or any(name in ("group", "advantage") for name in needs),
        told=() if own else tuple(name for name in contexts if name in TOLD),
        library="" if alone else method.library,
    )
