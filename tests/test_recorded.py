"""Accuracy where it counts: on hidden states of the demo's model as student and as teacher.

Random tensors hide the problem that this engine is about: near the teacher the gradient is a difference of
nearly equal numbers, and rounding the logits to bf16 destroys it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from opsd_kernels import Hidden, Logits, Objective, loss
from opsd_kernels.testing import eager_loss, relative_error
from opsd_train.backbone import completion_hidden
from opsd_train.demo import task
from opsd_train.demo.run import MODEL
from opsd_train.loading import load

ROWS = 64
OBJECTIVES = ["forward_kl", "reverse_kl", "jsd", "opsd", Objective(entry_clip=0.05, clip_mode="scale")]


@dataclass(frozen=True)
class Recording:
    """Hidden states in bf16, `[ROWS, 4, 128]`, and the head `[V, 128]`."""

    student: torch.Tensor
    teacher: torch.Tensor
    head: torch.Tensor


@pytest.fixture(scope="module")
def recording() -> Recording:
    """The demo model reads right answers, once behind the plain prompt and once behind the hinted one."""
    model, tokenizer = load(str(MODEL))
    # Sums below 1,000, so that every answer is three digits and the end.
    problems = [p for p in task.held_out_problems(8 * ROWS) if len(p["solution"]) == 3][:ROWS]
    answers = torch.tensor([[*tokenizer.encode(p["solution"]), tokenizer.eos_token_id] for p in problems])

    def hidden(template: str) -> torch.Tensor:
        texts = [template.format(**problem) for problem in problems]
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
            for text in texts
        ]
        width = max(len(ids["input_ids"]) for ids in prompts)
        ids = torch.tensor(
            [[tokenizer.pad_token_id] * (width - len(p["input_ids"])) + p["input_ids"] for p in prompts]
        )
        whole = torch.cat((ids, answers), dim=1)
        mask = (whole != tokenizer.pad_token_id).long()
        with torch.no_grad():
            return completion_hidden(model, whole, mask, answers.shape[1]).bfloat16()

    head = model.get_output_embeddings().weight.detach().bfloat16()
    return Recording(hidden(task.STUDENT_TEMPLATE), hidden(task.TEACHER_TEMPLATE), head)


def eager(
    student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, *, objective: str | Objective,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Full logits of a dtype, softmax and loss in fp32."""
    sources = (Hidden(x.to(dtype), w.to(dtype)) for x, w in ((student, head), (teacher, head.detach())))
    return eager_loss(*sources, objective=objective)


def gradients(function: Callable[..., torch.Tensor], data: Recording) -> tuple[torch.Tensor, torch.Tensor]:
    """dH and dW of a loss function."""
    student, head = data.student.detach().requires_grad_(), data.head.detach().requires_grad_()
    function(student, data.teacher, head).backward()
    assert student.grad is not None
    assert head.grad is not None
    return student.grad, head.grad


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_bf16_inputs_cost_no_more_than_fp32_logits(recording: Recording, objective: str | Objective) -> None:
    """What a trainer gets: gradients in bf16, whose last rounding is most of the error that is left."""
    double = Recording(*(x.double() for x in (recording.student, recording.teacher, recording.head)))
    exact = gradients(partial(loss, objective=objective, backend="reference"), double)

    def errors(function: Callable[..., torch.Tensor]) -> list[float]:
        found = gradients(function, recording)
        return [relative_error(x, truth) for x, truth in zip(found, exact, strict=True)]

    ours = errors(partial(loss, objective=objective, backend="torch"))
    fp32_logits = errors(partial(eager, dtype=torch.float32, objective=objective))
    bf16_logits = errors(partial(eager, dtype=torch.bfloat16, objective=objective))
    for name, mine, fp32, bf16 in zip(("dH", "dW"), ours, fp32_logits, bf16_logits, strict=True):
        print(f"{objective} {name}: {mine:.2e}, fp32 logits {fp32:.2e}, bf16 logits {bf16:.2e}")
        assert mine <= 1.5 * fp32
        assert bf16 > 1.5 * mine


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_engine_itself_errs_no_more_than_fp32_eager(
    recording: Recording, objective: str | Objective
) -> None:
    """The gradient of the logits before it is rounded to bf16, on logits of the recorded states."""
    z_s, z_t = (F.linear(x.float(), recording.head.float()) for x in (recording.student, recording.teacher))

    def gradient(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        student = z_s.to(dtype, copy=True).requires_grad_()
        function(Logits(student), Logits(z_t.to(dtype)), objective=objective).backward()
        assert student.grad is not None
        return student.grad

    exact = gradient(partial(loss, backend="reference"), torch.float64)
    ours = relative_error(gradient(partial(loss, backend="torch"), torch.float32), exact)
    fp32_logits = relative_error(gradient(eager_loss, torch.float32), exact)
    print(f"{objective} dz: {ours:.2e}, eager {fp32_logits:.2e}")
    assert ours <= 1.5 * fp32_logits
