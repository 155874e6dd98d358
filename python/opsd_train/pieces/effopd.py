"""Weight extrapolation: go on along the path of training as long as a small evaluation improves.

EffOPD (arXiv 2605.11739). After steps 1, 2, 4, 8, ... the weights theta move to theta + f (theta - base),
where base are the weights after the previous search. f is 2 first and f / (1 + f) after a success: theta -
base has then grown by the factor 1 + f, so that every try adds the same vector, 2 (theta - base) of the
first. The first try that does not improve the score is undone and ends the search.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from opsd_train.reading.prompts import Prompt

BASE_FILE = "extrapolation_base.safetensors"


@dataclass(frozen=True)
class Trial:
    """One try of a search; the first entry of a search has factor 0, the weights as they were."""

    step: int
    factor: float
    score: float
    accepted: bool


class Extrapolation:
    """The search, and the weights that it starts from. Holds two further copies of the parameters.

    Args:
        parameters: those to move, by name, before training. The authors' code moves the weights of attention
            and MLP and leaves embeddings, norms and the head.
        score: evaluates the model as it is; higher is better. It is called up to `tries` + 1 times a search
            and must not be noise: about 50 problems by greedy decoding.
        factor: f of the first try, above 0.
        tries: most tries of a search.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        score: Callable[[], float],
        factor: float = 2.0,
        tries: int = 5,
    ) -> None:
        if not parameters:
            raise ValueError("parameters: expected at least one; got none")
        if not factor > 0:
            raise ValueError(f"factor: expected a number above 0; got {factor}")
        if tries < 1:
            raise ValueError(f"tries: expected at least 1; got {tries}")
        self.parameters, self.score = dict(parameters), score
        self.factor, self.tries = factor, tries
        self.base = self._copy()
        self.history: list[Trial] = []

    @staticmethod
    def due(step: int) -> bool:
        """Whether `step` is a power of two."""
        return step > 0 and step & (step - 1) == 0

    def search_if_due(self, step: int) -> None:
        """Search after a step that is a power of two."""
        if self.due(step):
            self.search(step)

    def search(self, step: int = 0) -> list[Trial]:
        """Move the parameters to the best weights on the line, and start from them the next time."""
        trials, best = [Trial(step, 0.0, self.score(), True)], self._copy()
        factor = self.factor
        for _ in range(self.tries):
            self._move(factor)
            score = self.score()
            accepted = score > max(trial.score for trial in trials)
            trials.append(Trial(step, factor, score, accepted))
            if not accepted:
                self._restore(best)
                break
            best, factor = self._copy(), factor / (1 + factor)
        self.base = best
        self.history += trials
        return trials

    def metrics(self) -> dict[str, float]:
        """The last search: `validation_accuracy` of the weights it kept, and how many tries those passed."""
        starts = [i for i, trial in enumerate(self.history) if trial.factor == 0]
        if not starts:
            return {}
        kept = [trial for trial in self.history[starts[-1] :] if trial.accepted]
        return {"validation_accuracy": kept[-1].score, "extrapolations": len(kept) - 1}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the base, which a resumed run could not know."""
        save_file({name: tensor.contiguous() for name, tensor in self.base.items()}, Path(folder) / BASE_FILE)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read what `save` wrote; ValueError if it is not there or belongs to other parameters."""
        path = Path(folder) / BASE_FILE
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: expected {BASE_FILE} in {folder}; got none")
        saved = load_file(path)
        if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in self.base.items()}:
            raise ValueError(f"resume_from_checkpoint: expected {path} to hold this model's parameters")
        for name, tensor in saved.items():
            self.base[name].copy_(tensor)

    @torch.no_grad()
    def _move(self, factor: float) -> None:
        """The sum in fp32, so that bf16 weights are rounded once."""
        for name, parameter in self._detached():
            now = parameter.float()
            parameter.copy_(now + factor * (now - self.base[name].float()))

    @torch.no_grad()
    def _restore(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._detached():
            parameter.copy_(weights[name])

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.clone() for name, parameter in self._detached()}

    def _detached(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.parameters.items())


def layer_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The trained matrices of attention and MLP by name: what the authors' code moves.

    Raises ValueError naming the option for a model with adapters: a line through the factors of a product is
    none through the product.
    """
    if isinstance(model, PeftModel):
        raise ValueError("extrapolate: expected a model without adapters; got a PEFT model")
    found: dict[str, Tensor] = {
        name: one
        for name, one in model.named_parameters()
        if one.requires_grad and one.dim() > 1 and ".layers." in f".{name}"
    }
    if not found:
        raise ValueError("extrapolate: expected trained matrices in the model's `layers`; got none")
    return found


def hold_back(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """`count` prompts, evenly spaced, to validate on, and first the others, to train on.

    They are taken from the training set, so that an evaluation on held-out rows stays one on rows that chose
    nothing. Raises ValueError naming the option unless some are left.
    """
    if count >= len(prompts):
        raise ValueError(f"extrapolate: expected less than the {len(prompts)} training rows; got {count}")
    chosen = {index * len(prompts) // count for index in range(count)}
    held = [prompts[index] for index in sorted(chosen)]
    return [prompt for index, prompt in enumerate(prompts) if index not in chosen], held
