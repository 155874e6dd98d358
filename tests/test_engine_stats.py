"""`token_stats` against the reference and against formulas written anew."""

from typing import Any

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from opsd_kernels import Logits, Objective, TokenStats, loss, token_stats
from opsd_kernels.testing import hidden_case, hidden_sources, logits_case, logits_of

BACKENDS = ("torch", "reference")
CLIPPED = Objective("forward_kl", entry_clip=0.05)
ROWS, VOCAB = 24, 37


def _setup(temperature: float = 1.0) -> tuple[Logits, Logits, Categorical, Categorical, torch.Tensor]:
    z_s, z_t = logits_of(logits_case((4, 6), VOCAB, gap=1.5))
    ids = torch.arange(ROWS).reshape(4, 6) % VOCAB
    student, teacher = (Categorical(logits=z / temperature) for z in (z_s, z_t))
    return Logits(z_s), Logits(z_t), student, teacher, ids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_every_field_is_what_its_name_says(temperature: float, backend: str) -> None:
    z_s, z_t, s, t, ids = _setup(temperature)
    stats = token_stats(z_s, z_t, token_ids=ids, temperature=temperature, backend=backend)
    mixture = Categorical(probs=(s.probs + t.probs) / 2)
    expected = TokenStats(
        forward_kl=kl_divergence(t, s),
        reverse_kl=kl_divergence(s, t),
        jsd=(kl_divergence(t, mixture) + kl_divergence(s, mixture)) / 2,
        student_entropy=s.entropy(),
        teacher_entropy=t.entropy(),
        student_logprob=s.log_prob(ids),
        teacher_logprob=t.log_prob(ids),
        top1_agreement=(s.probs.argmax(-1) == t.probs.argmax(-1)).double(),
        clipped_fraction=torch.zeros(4, 6),
        dropped_share=torch.zeros(4, 6),
    )
    for name, value, truth in zip(TokenStats._fields, stats, expected, strict=True):
        assert value.dtype == torch.float32, name
        assert value.shape == (4, 6), name
        torch.testing.assert_close(value, truth.float(), msg=name)
    assert 0 < stats.top1_agreement.mean() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workspace", [1, None], ids=["row by row", "at once"])
def test_hidden_states_match_the_reference(workspace: int | None, dtype: torch.dtype) -> None:
    case = hidden_case((5, 6), 301, 16, bias=True, softcap=8.0, logit_scale=1.3).to(dtype)
    mask, ids = torch.arange(30).reshape(5, 6) % 4 != 0, torch.arange(30).reshape(5, 6)
    options: dict[str, Any] = {"mask": mask, "token_ids": ids, "objective": "reverse_kl", "temperature": 0.9}
    stats = token_stats(case.student, case.teacher, workspace_bytes=workspace, **options)
    wide = case.to(torch.float64)
    truth = token_stats(wide.student, wide.teacher, backend="reference", **options)
    for name, value, expected in zip(TokenStats._fields, stats, truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
        assert (value[~mask] == 0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_divergences_are_those_of_the_loss(backend: str) -> None:
    z_s, z_t, *_ = _setup()
    stats = token_stats(z_s, z_t, backend=backend)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        tokens = loss(z_s, z_t, objective=name, reduction="none", backend=backend)
        torch.testing.assert_close(getattr(stats, name), tokens.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["zero", "scale"])
def test_clipped_fraction_is_the_share_that_the_clips_remove(mode: str, backend: str) -> None:
    z_s, z_t, s, t, _ = _setup()

    def fraction(objective: Objective) -> torch.Tensor:
        return token_stats(z_s, z_t, objective=objective, backend=backend).clipped_fraction

    assert (fraction(Objective("forward_kl")) == 0).all()
    assert (fraction(Objective("forward_kl", entry_clip=100.0, token_clip=100.0)) == 0).all()
    divergence = kl_divergence(t, s)
    token = fraction(Objective("forward_kl", token_clip=0.5, clip_mode=mode))
    expected = (1 - 0.5 / divergence).clamp(min=0).float()
    torch.testing.assert_close(token, expected)
    assert (expected > 0).any()
    assert (expected == 0).any()
    both = fraction(Objective("forward_kl", entry_clip=0.05, token_clip=0.01, clip_mode=mode))
    entry = fraction(Objective("forward_kl", entry_clip=0.05, clip_mode=mode))
    assert (both >= entry).all()
    assert (both > entry).any()
    terms = t.probs * (t.probs / s.probs).log()
    left = terms.clamp(max=0.05).sum(-1) / terms.sum(-1)
    torch.testing.assert_close(entry, (1 - left).float(), rtol=1e-5, atol=1e-6)
    assert (left < 0).any(), "the clipped sum of some token is negative: more than its divergence is gone"


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_ids_log_probs_are_unknown(backend: str) -> None:
    z_s, z_t, *_, ids = _setup()
    mask = ids % 2 == 0
    stats = token_stats(z_s, z_t, mask=mask, backend=backend)
    for value in (stats.student_logprob, stats.teacher_logprob):
        assert value[mask].isnan().all()
        assert (value[~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_columns(backend: str) -> None:
    """They carry no entropy and no divergence, and their log-prob is minus infinity."""
    z_s, z_t, *_, ids = _setup()
    expected = token_stats(z_s, z_t, token_ids=ids % 8, objective=CLIPPED, vocab_size=8, backend=backend)
    cut = [Logits(x.z.index_fill(-1, torch.arange(8, VOCAB), -torch.inf)) for x in (z_s, z_t)]
    stats = token_stats(cut[0], cut[1], token_ids=ids % 8, objective=CLIPPED, backend=backend)
    for name, value, truth in zip(TokenStats._fields, stats, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-7, msg=name)
    outside = token_stats(cut[0], cut[1], token_ids=torch.full((4, 6), 20), backend=backend)
    assert (outside.student_logprob == -torch.inf).all()
    assert (outside.teacher_logprob == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_that_the_student_alone_excludes(backend: str) -> None:
    z_s, z_t, *_ = _setup()
    z_s.z[0, 0, 3] = -torch.inf
    stats = token_stats(z_s, z_t, objective=CLIPPED, backend=backend)
    assert stats.forward_kl[0, 0] == torch.inf
    assert stats.clipped_fraction[0, 0] == 1
    for name in ("reverse_kl", "jsd", "student_entropy", "teacher_entropy"):
        assert getattr(stats, name).isfinite().all(), name
    assert stats.forward_kl.flatten()[1:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dead_row_of_nan_is_zero_and_a_live_one_is_nan(backend: str) -> None:
    z_s, z_t, *_, ids = _setup()
    z_s.z[1, 2] = torch.nan
    mask = torch.ones(4, 6, dtype=torch.bool)
    live = token_stats(z_s, z_t, token_ids=ids, backend=backend)
    mask[1, 2] = False
    dead = token_stats(z_s, z_t, token_ids=ids, mask=mask, backend=backend)
    for name in ("forward_kl", "reverse_kl", "jsd", "student_entropy", "student_logprob"):
        assert getattr(live, name)[1, 2].isnan(), name
        assert getattr(dead, name)[1, 2] == 0, name
        assert torch.equal(getattr(live, name)[mask], getattr(dead, name)[mask]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["no rows", "all masked"])
def test_nothing_to_do(how: str, backend: str) -> None:
    case = hidden_case((0, 3) if how == "no rows" else (2, 3), 7, 4).to(torch.float32)
    mask = None if how == "no rows" else torch.zeros(2, 3, dtype=torch.bool)
    stats = token_stats(case.student, case.teacher, mask=mask, backend=backend)
    for value in stats:
        assert value.shape == case.student.lead
        assert (value == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    case = hidden_case(20, 301, 16).to(torch.bfloat16)
    expected = token_stats(case.student, case.teacher, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = token_stats(case.student, case.teacher, backend=backend)
    for value, truth in zip(stats, expected, strict=True):
        assert torch.equal(value, truth) or truth.isnan().all()


def test_three_tensors_are_enough() -> None:
    case = hidden_case(9, 31, 8).to(torch.float32)
    student, teacher = hidden_sources(case)
    tensors = student.hidden.requires_grad_(), teacher.hidden, student.weight
    for value, truth in zip(token_stats(*tensors), token_stats(case.student, case.teacher), strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(value, truth, equal_nan=True)
