"""Training from a cache: stored rollouts instead of generation, stored log-probs instead of a teacher."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import opsd_kernels
from opsd_kernels import Hidden, Recipe, Sampled, TokenStats, TopK
from opsd_kernels.evaluation import KNOWS_TEACHER
from opsd_kernels.preparers import prepare
from opsd_kernels.tokens import DATA, Batch
from opsd_kernels.weights import weight
from opsd_train.backbone import completion_hidden, head_source
from opsd_train.method import POOL, SCORED, MethodRun
from opsd_train.offline.cache import Cache, CachedRollout, collate_cached, digest
from opsd_train.reading.prompts import Prompt
from opsd_train.reading.readers import logprobs_of
from opsd_train.watch.phases import Phase, untimed

STORED = 4  # the stream of random numbers; 0 to 3 are taken
BATCH, LENGTH = 2, 3  # tokens of the call that tries a method out
# Statistics beside a teacher of which the sampled tokens' log-probs are known.
KNOWN = TokenStats(
    *[
        torch.full((BATCH, LENGTH), torch.nan if name in KNOWS_TEACHER else -0.5)
        for name in TokenStats._fields
    ]
)
FLAGS, INDICES = ("correct", "privileged", "selected"), ("group", "span", "turn", "chunk")


class StoredRollouts:
    """The rollouts of a cache by the prompts of a training set.

    Args:
        folder: of the cache.
        prompts: the training set, those the cache was made of.
        temperature: of the loss.

    Raises:
        ValueError: the cache is of other prompts or of another temperature, or none.
    """

    def __init__(self, folder: str | os.PathLike[str], prompts: Sequence[Prompt], temperature: float) -> None:
        self.cache = Cache(folder)
        info = self.cache.info
        if info["prompts"] != digest(prompts):
            raise ValueError(
                f"offline: expected a cache of the {len(prompts)} rows of data with their templates; "
                f"{folder} is of others"
            )
        if info["temperature"] != temperature:
            raise ValueError(
                f"offline: expected loss_temperature {info['temperature']}, that of the cache's log-probs; "
                f"got {temperature}"
            )
        self.samples: int = info["samples"]
        self.top_k: int = info["top_k"]
        self._first = {prompt.where: index * self.samples for index, prompt in enumerate(prompts)}

    def take(self, prompts: Sequence[Prompt], seed: int, step: int) -> list[CachedRollout]:
        """A rollout of each prompt, different ones where a prompt comes several times.

        Which ones is determined by seed and step. Raises ValueError for a prompt that comes more often than
        it has rollouts.
        """
        random = np.random.default_rng((seed, STORED, step))
        orders: dict[str, list[int]] = {}
        found = []
        for prompt in prompts:
            if prompt.where not in orders:
                orders[prompt.where] = random.permutation(self.samples).tolist()
            if not orders[prompt.where]:
                raise ValueError(
                    f"offline: expected at least num_generations rollouts of a prompt in the cache; got "
                    f"{self.samples}"
                )
            item: CachedRollout = self.cache[self._first[prompt.where] + orders[prompt.where].pop()]
            # The prompt at hand knows its row, which the cache does not hold.
            found.append(replace(item, rollout=replace(item.rollout, prompt=prompt)))
        return found


class StoredReaders:
    """The student beside a teacher that is known from a cache; see `Readers`.

    Args:
        method: whose teacher it is.
        top_k: entries of each token that the cache holds.

    Raises:
        ValueError: the method needs more of its teacher than the cache holds.
    """

    def __init__(self, method: MethodRun, top_k: int) -> None:
        self.method = method
        self.kind = kind_of(method, top_k)

    def read(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Tensor],
        temperature: float,
        step: int = 0,
        phase: Phase = untimed,
    ) -> tuple[Hidden, dict[str, Any], dict[str, Tensor]]:
        """The student, the loss's teacher by role, and its columns of data; `phase` times who reads."""
        mask = inputs["completion_mask"].bool()
        length = mask.shape[1]
        token_ids = inputs["input_ids"][:, -length:]
        with phase("student"):
            hidden = completion_hidden(model, inputs["input_ids"], inputs["attention_mask"], length)
        student = head_source(model, hidden)

        def own() -> Tensor:
            return logprobs_of(student, token_ids, mask=mask, temperature=temperature)

        def score(role: str) -> Tensor:
            raise AssertionError(f"{role} is refused at the start")

        data = self.method.scored(inputs, score, own)
        teacher: Sampled | TopK
        if self.kind == "sampled":
            teacher = Sampled(inputs["stored_logprob"], temperature)
        else:
            teacher = TopK(inputs["stored_top_ids"], inputs["stored_top_logprobs"], temperature)
        return student, dict.fromkeys(self.method.recipe().roles, teacher), data


def stored_columns(items: Sequence[CachedRollout], method: MethodRun, pad_id: int) -> dict[str, Tensor]:
    """What a batch of stored rollouts has besides those of rollouts that were just written."""
    stored = collate_cached(items, pad_id)
    found = {
        "stored_logprob": stored["teacher_logprob"],
        "stored_top_ids": stored["top_ids"],
        "stored_top_logprobs": stored["top_logprobs"],
    }
    if "rollout_logprob" in method.needs:
        found["data_rollout_logprob"] = stored["rollout_logprob"]
    return found


def kind_of(method: MethodRun, top_k: int) -> str:
    """`sampled` if the teacher's log-probs of the sampled tokens are enough for a method, else `top_k`.

    Found out by evaluating the method on a few made-up tokens. Raises ValueError if its `top_k` entries are
    not enough either.
    """
    recipe = method.recipe()
    live = [name for name in method.needs if name in SCORED or name in POOL]
    if live or recipe.roles not in ((), ("teacher",)):
        wanted = ", ".join([*recipe.roles, *live])
        raise ValueError(
            f"offline: expected a method with a single teacher that reads nothing but the rollouts; "
            f"{method.key!r} needs {wanted}"
        )
    tiny = torch.zeros(BATCH, LENGTH)
    error = _refusal(method, recipe, Sampled(tiny - 1))
    if error is None:
        return "sampled"
    supports = [getattr(term.loss, "support", None) for term in recipe.terms if term.teacher is not None]
    if all(one is not None and one.of == "teacher" and one.k <= top_k for one in supports):
        ids = torch.arange(top_k).expand(BATCH, LENGTH, top_k)
        error = _refusal(method, recipe, TopK(ids, torch.full(ids.shape, -1.0).log_softmax(-1) - 1))
        if error is None:
            return "top_k"
    raise ValueError(
        f"offline: expected a method whose teacher is known at the sampled token or at its {top_k} most "
        f"likely ones (--teacher-top-k of the cache); {method.key!r} needs a live one: {error}"
    )


def _refusal(method: MethodRun, recipe: Recipe, teacher: Sampled | TopK) -> str | None:
    """Why the method cannot be evaluated with such a teacher, None if it can."""
    vocab = 8 if isinstance(teacher, Sampled) else 2 * teacher.ids.shape[-1] + 1
    shapes = {"sequence": (BATCH,), "token": (BATCH, LENGTH), "teachers": (BATCH, LENGTH, 2)}
    data = {name: _made_up(name, shapes[DATA[name][0]]) for name in method.needs}
    student = opsd_kernels.Logits(torch.arange(float(vocab)).cos().expand(BATCH, LENGTH, vocab).clone())
    try:
        if isinstance(teacher, Sampled):
            _weigh(recipe, Batch(torch.ones(BATCH, LENGTH, dtype=torch.bool), data, lambda: KNOWN))
        opsd_kernels.loss(
            student,
            dict.fromkeys(recipe.roles, teacher),
            objective=recipe,
            token_ids=torch.zeros(BATCH, LENGTH, dtype=torch.int64),
            data=data,
        )
    except ValueError as error:
        return str(error)
    return None


def _weigh(recipe: Recipe, batch: Batch) -> None:
    """ValueError if a weight or a preparer needs more of the teacher than the sampled tokens' log-probs."""
    for spec in recipe.prepare:
        made = prepare[spec.name](batch, **spec.options)
        batch = replace(batch, data={**batch.data, **made})
        _check_known(spec.name, *made.values())
    for term in recipe.terms:
        for use in term.weights:
            _check_known(use.name, weight[use.name](batch, **use.options))


def _check_known(name: str, *columns: Tensor) -> None:
    if not all(bool(column.isfinite().all()) for column in columns):
        raise ValueError(f"{name!r} measures the teacher's distribution")


def _made_up(name: str, shape: tuple[int, ...]) -> Tensor:
    dtype = torch.bool if name in FLAGS else torch.int64 if name in INDICES else torch.float32
    return torch.zeros(shape, dtype=dtype)
