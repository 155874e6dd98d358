"""The alignment score against gradients of one's own, its signs, its ceiling and its command."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from driver_tiny import TOKENIZER, tiny_config, tiny_model, tiny_prompts
from opsd_kernels import Logits
from opsd_train.reading.prompts import Prompt
from opsd_train.rollouts import Sampling, Vocabulary, generate
from opsd_train.studies.alignment import cosine, jackknife
from opsd_train.studies.diagnose import Candidate, Probe, choose, diagnose, objective_loss
from opsd_train.teachers.weights import Teacher

ANSWER = 9  # a token


def probe_of(model: torch.nn.Module, **settings: object) -> Probe:
    probe = Probe(
        student=model,
        parameters=choose(model, "all"),
        sampling=Sampling(0.8, 1.0, 0, 3, 4),
        vocabulary=Vocabulary.of(model, TOKENIZER),
        rollouts=6,
        reward=lambda rollout: float(sum(rollout.completion) % 2),
        seed=5,
    )
    return replace(probe, **settings)


def prompts_of(tmp_path: Path, count: int) -> list[Prompt]:
    return tiny_prompts(tiny_config(tmp_path))[:count]


class Fixed(Teacher):
    """Has the same logits [V] everywhere."""

    def __init__(self, z: Tensor) -> None:
        super().__init__(torch.nn.Identity())
        self.z = z

    def source(self, input_ids: Tensor, attention_mask: Tensor, length: int) -> Logits:
        return Logits(self.z.expand(len(input_ids), length, -1))


def flat(value: Tensor, model: torch.nn.Module) -> np.ndarray:
    found = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([one.flatten() for one in found]).numpy()


def cosine_of(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def by_definition(model: torch.nn.Module, probe: Probe, prompts: list[Prompt]) -> dict[str, np.ndarray]:
    """Per prompt, in fp64 and sequence by sequence: the ideal's halves, and descent of the forward KL."""
    twin = copy.deepcopy(model).double()

    def rows(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
        return twin(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]

    found: dict[str, list] = {"halves": [], "right": [], "wrong": []}
    for number, prompt in enumerate(prompts):
        drawn = generate(
            model, [prompt.student_ids] * probe.rollouts, probe.sampling, probe.vocabulary, (5, number)
        )
        rewards = np.array([sum(one) % 2 for one in drawn], dtype=float)
        halves, parts = [0.0, 0.0], {"right": np.zeros(1), "wrong": np.zeros(1)}
        for i, completion in enumerate(drawn):
            log_s = (rows(prompt.student_ids, completion) / 0.8).log_softmax(-1)
            chosen = sum(log_s[t, token] for t, token in enumerate(completion))
            halves[i % 2] = halves[i % 2] + (rewards[i] - rewards.mean()) * flat(chosen, twin)
            log_s = rows(prompt.student_ids, completion).log_softmax(-1)
            log_t = rows(prompt.teacher_ids, completion).log_softmax(-1).detach()
            kl = (log_t.exp() * (log_t - log_s)).sum()
            part = "right" if rewards[i] > min(rewards.mean(), 0.99) else "wrong"
            parts[part] = parts[part] - flat(kl, twin)
        found["halves"].append(halves)
        for name, value in parts.items():
            found[name].append(value + np.zeros_like(halves[0]))
    return {name: np.array(value) for name, value in found.items()}


def test_scores_are_those_of_gradients_of_ones_own(tmp_path: Path) -> None:
    model, prompts = tiny_model(), prompts_of(tmp_path, 5)
    probe = probe_of(model)
    candidate = Candidate("kl", objective_loss("forward_kl"), prompts, Teacher(model))
    found = diagnose(probe, [candidate])
    own = by_definition(model, probe, prompts)
    ideal, descent = own["halves"].sum(1), own["right"] + own["wrong"]
    (score,) = found["candidates"]
    expected = [cosine_of(a, b) if a.any() else None for a, b in zip(ideal, descent, strict=True)]
    assert score["prompts"] == pytest.approx(expected, abs=1e-4)
    assert found["informative"] == sum(one is not None for one in expected) >= 3
    assert score["overall"]["value"] == pytest.approx(cosine_of(ideal.sum(0), descent.sum(0)), abs=1e-4)
    for name in ("right", "wrong"):
        assert score[name] == pytest.approx(cosine_of(ideal.sum(0), own[name].sum(0)), abs=1e-4)
    without = [cosine_of(ideal.sum(0) - ideal[g], descent.sum(0) - descent[g]) for g in range(5)]
    half = 2.776445 * math.sqrt(4 / 5 * sum((one - np.mean(without)) ** 2 for one in without))
    assert score["overall"]["high"] == pytest.approx(min(1.0, score["overall"]["value"] + half), abs=1e-3)
    halves = own["halves"].sum(0)
    r = cosine_of(halves[0], halves[1])
    assert found["ceiling"] == (pytest.approx(math.sqrt(2 * r / (1 + r)), abs=1e-4) if r > 0 else None)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_candidate_has_its_own_context_on_the_same_rollouts(tmp_path: Path) -> None:
    model, prompts = tiny_model(), prompts_of(tmp_path, 4)
    other = [
        replace(one, teacher_ids=two.teacher_ids) for one, two in zip(prompts, prompts[::-1], strict=True)
    ]
    candidates = [
        Candidate(name, objective_loss("forward_kl"), given, Teacher(model))
        for name, given in (("own", prompts), ("other", other))
    ]
    together = diagnose(probe_of(model), candidates)["candidates"]
    for candidate, found in zip(candidates, together, strict=True):
        (alone,) = diagnose(probe_of(model), [candidate])["candidates"]
        assert found["prompts"] == pytest.approx(alone["prompts"], abs=1e-6)
    own, others = ([one for one in found["prompts"] if one is not None] for found in together)
    assert own
    assert own[0] != pytest.approx(others[0], abs=1e-3)


def one_token(tmp_path: Path, rollouts: int) -> tuple[torch.nn.Module, Probe, list[Prompt]]:
    """Completions of one token, right if it is ANSWER; the student's chances are spread over the tokens."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(0.02)
    reward = lambda rollout: float(rollout.completion[0] == ANSWER)  # noqa: E731
    probe = probe_of(model, sampling=Sampling(1.0, 1.0, 0, 1, 64), rollouts=rollouts, reward=reward)
    return model, probe, prompts_of(tmp_path, 4)


def test_oracle_is_aligned_and_its_opposite_is_not(tmp_path: Path) -> None:
    _, probe, prompts = one_token(tmp_path, 200)
    oracle = torch.full((32,), -20.0)
    oracle[ANSWER] = 20.0
    candidates = [
        Candidate("oracle", objective_loss("forward_kl"), prompts, Fixed(oracle)),
        Candidate("reversed", objective_loss("forward_kl"), prompts, Fixed(-oracle)),
        Candidate("reverse_kl oracle", objective_loss("reverse_kl"), prompts, Fixed(oracle / 10)),
    ]
    found = diagnose(probe, candidates)
    values = [one["overall"]["value"] for one in found["candidates"]]
    assert values[0] > 0.5
    assert values[1] < -0.5
    assert values[2] > 0.5
    assert found["candidates"][0]["overall"]["low"] > 0 > found["candidates"][1]["overall"]["high"]


def test_ideal_is_the_gradient_of_success_up_to_noise_that_the_ceiling_knows(tmp_path: Path) -> None:
    """A candidate whose loss is the exact probability of failure scores what the ceiling says."""
    _, probe, prompts = one_token(tmp_path, 16)

    def failure(student: object, teacher: object, mask: Tensor, ids: Tensor) -> Tensor:
        z = student.hidden @ student.weight.T
        return -(z.softmax(-1)[..., ANSWER] * mask).sum()

    prompts = prompts * 4
    found = diagnose(probe, [Candidate("exact", failure, prompts, Fixed(torch.zeros(32)))])
    assert 0.2 < found["ceiling"] < 0.97
    assert found["candidates"][0]["overall"]["value"] == pytest.approx(found["ceiling"], abs=0.06)


def test_success_rises_along_an_aligned_direction(tmp_path: Path) -> None:
    """By finite differences: a step along the descent direction changes the success as the cosine says."""
    model, _, prompts = one_token(tmp_path, 4)
    twin = copy.deepcopy(model).double()
    ids = [torch.tensor([prompt.student_ids]) for prompt in prompts]

    def success() -> Tensor:
        return sum(twin(one).logits[0, -1].softmax(-1)[ANSWER] for one in ids)

    descent = -flat(-sum(twin(one).logits[0, -1].log_softmax(-1)[ANSWER] for one in ids), twin)
    exact = flat(success(), twin)
    slopes = []
    for step in (1e-5, -1e-5):
        start = 0
        moved = torch.from_numpy(descent / np.linalg.norm(descent) * step)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter += moved[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
            slopes.append(success().item())
            start = 0
            for parameter in twin.parameters():
                parameter -= moved[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
    slope = (slopes[0] - slopes[1]) / 2e-5
    score = cosine(torch.from_numpy(exact), torch.from_numpy(descent))
    assert slope == pytest.approx(score * np.linalg.norm(exact), rel=1e-4)
    assert score > 0.5


def test_equal_rewards_say_nothing(tmp_path: Path) -> None:
    model, prompts = tiny_model(), prompts_of(tmp_path, 2)
    probe = probe_of(model, reward=lambda rollout: 1.0)
    found = diagnose(probe, [Candidate("kl", objective_loss("opsd"), prompts, Teacher(model))])
    (score,) = found["candidates"]
    assert (found["informative"], found["ceiling"], found["reward"]) == (0, None, 1.0)
    assert (score["overall"], score["mean"], score["prompts"]) == (None, None, [None, None])


def test_chosen_parameters() -> None:
    model = tiny_model()
    named = dict(model.named_parameters())
    assert len(choose(model, "all")) == len(named)
    last = {id(one) for one in choose(model, "last")}
    assert last == {id(one) for name, one in named.items() if name.startswith("model.layers.1.")}
    assert len(choose(model, "q_proj")) == 2
    named["model.layers.1.self_attn.q_proj.weight"].requires_grad_(False)
    assert len(choose(model, "q_proj")) == 1
    with pytest.raises(ValueError, match="nothing matches 'conv'"):
        choose(model, "conv")


def test_gradient_of_a_subset_is_the_cut_of_the_whole(tmp_path: Path) -> None:
    model, prompts = tiny_model(), prompts_of(tmp_path, 5)
    candidate = Candidate("kl", objective_loss("forward_kl"), prompts, Teacher(model))
    probe = probe_of(model, parameters=choose(model, "lm_head|embed"))
    (cut,) = diagnose(probe, [candidate])["candidates"]
    own = by_definition(model, probe, prompts)
    size = model.get_input_embeddings().weight.numel()  # the first parameter
    expected = cosine_of(own["halves"].sum((0, 1))[:size], (own["right"] + own["wrong"]).sum(0)[:size])
    assert cut["overall"]["value"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollouts": 5}, "rollouts: expected an even number of at least 4; got 5"),
        ({"rollouts": 2}, "rollouts: expected an even number of at least 4; got 2"),
        ({"sampling": Sampling(0.0, 1.0, 0, 3)}, "sampling: expected a temperature above 0"),
        ({"sampling": Sampling(1.0, 0.9, 0, 3)}, "sampling: expected a temperature above 0, top_p 1"),
        ({"parameters": [torch.ones(1)]}, "parameters: expected some, all of which require a gradient"),
    ],
)
def test_wrong_probes(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe_of(tiny_model(), **settings)


def test_candidates_share_their_students_prompts(tmp_path: Path) -> None:
    model, prompts = tiny_model(), prompts_of(tmp_path, 3)
    one = Candidate("one", objective_loss("opsd"), prompts, Teacher(model))
    with pytest.raises(ValueError, match="candidates: expected at least one, all with the same student's"):
        diagnose(probe_of(model), [one, replace(one, prompts=prompts[:2])])
    with pytest.raises(ValueError, match="candidates: expected at least one"):
        diagnose(probe_of(model), [])


def test_jackknife_of_one_group_has_no_interval() -> None:
    assert jackknife(torch.ones(1, 3), torch.ones(1, 3)) is None
