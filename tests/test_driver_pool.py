"""Pools of teachers and the columns that they make."""

import pytest
import torch

from driver_tiny import TOKENIZER, tiny_model
from opsd_kernels import LogLinear
from opsd_train.data.rows import load_rows
from opsd_train.reading.contexts import Attempt, Context
from opsd_train.reading.pool import score_pool
from opsd_train.reading.prompts import Encoder, Templates, pad_right
from opsd_train.reading.readers import logprobs_of
from opsd_train.reading.roles import Roles, collate_role
from opsd_train.teachers.weights import Teacher

AUDIBLE = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])


def test_columns_of_a_pool() -> None:
    generator = torch.Generator().manual_seed(0)
    said = {name: -torch.rand(3, 4, generator=generator) for name in "abc"}
    heard = {name: AUDIBLE[:, index] for index, name in enumerate("abc")}
    said["c"][:] = torch.nan
    said["a"][0, 3] = torch.nan  # a token that does not count
    asked: list[str] = []

    def score(role: str) -> torch.Tensor:
        asked.append(role)
        return said[role]

    found = score_pool(["b", "a", "c"], score, heard)
    assert asked == ["b", "a", "c"]
    logprobs = found["teacher_logprobs"]
    assert logprobs.shape == (3, 4, 3)
    assert torch.equal(logprobs[:2, :, 0], said["b"][:2])
    assert torch.equal(logprobs[0, :3, 1], said["a"][0, :3])
    # Who is not heard says the mean of those who are; where none is, what it reads then.
    torch.testing.assert_close(logprobs[0, :3, 2], (said["a"][0, :3] + said["b"][0, :3]) / 2)
    assert torch.equal(logprobs[1, :, 1], said["b"][1])
    assert torch.equal(logprobs[1, :, 2], said["b"][1])
    assert torch.equal(logprobs[2, :, 0], said["b"][2])
    assert found["teacher_weight"].tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="roles: expected at least one teacher; got none"):
        score_pool([], score, heard)


def test_pool_of_contexts_reads_the_rollouts_of_a_step() -> None:
    """From rows and rollouts to the columns, each log-prob against the whole model on that row alone."""
    templates = Templates("{problem}", "{solution};{problem}")
    records = [{"problem": "1+2=", "solution": "3"}, {"problem": "10+20="}]
    rows = load_rows(records, templates, privileged=False)
    rows = [rows[0], rows[0], rows[1]]
    completions = [(9, 10, 11), (8,), (7, 6)]
    attempts = [Attempt("4", 0.0), Attempt("3", 1.0), Attempt("30", 1.0)]
    options = {"template": "{demonstration};{problem}"}
    roles = Roles(
        {
            "teacher": Context("full_solution", {"template": templates.teacher}),
            "peer": Context("sibling", options),
        }
    )
    found = roles.read(rows, Encoder(TOKENIZER, 32, 32), attempts)
    teacher = Teacher(tiny_model())
    ids, mask = pad_right(completions, pad_id=0)

    def score(role: str) -> torch.Tensor:
        batch = collate_role(role, found[role].ids, completions, pad_id=0)
        source = teacher.source(batch[f"{role}_input_ids"], batch[f"{role}_attention_mask"], ids.shape[1])
        return logprobs_of(source, ids, mask=mask.bool(), temperature=1.5)

    heard = {role: torch.tensor(reading.privileged) for role, reading in found.items()}
    made = score_pool(["teacher", "peer"], score, heard)
    assert made["teacher_weight"].tolist() == [[0.5, 0.5], [1, 0], [0, 0]]
    told = [["3;1+2=", "3;1+2="], ["3;1+2=", None], [None, None]]
    for row, texts in enumerate(told):
        for column, text in enumerate(texts):
            plain = "1+2=" if row < 2 else "10+20="
            message = next((said for said in (text, *texts) if said is not None), plain)
            expected = alone(message, completions[row])
            logprobs = made["teacher_logprobs"][row, : len(completions[row]), column]
            assert logprobs.tolist() == pytest.approx(expected, abs=1e-4)
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


def alone(message: str, completion: tuple[int, ...]) -> list[float]:
    """Log-probs at temperature 1.5 of a completion behind one message, from the model's own logits."""
    chat = [{"role": "user", "content": message}]
    prompt = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        z = tiny_model().eval()(torch.tensor([[*prompt, *completion]])).logits[0].double()
    log_t = (z / 1.5).log_softmax(dim=-1)
    return [log_t[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]


def test_log_probs_of_a_mixture_of_logits() -> None:
    ids, other = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[9, 9, 6, 7]])
    teacher = Teacher(tiny_model())
    sources = [teacher.source(one, torch.ones_like(one), 2) for one in (ids, other)]
    found = logprobs_of(LogLinear(list(zip([0.7, 0.3], sources, strict=True))), ids[:, -2:])
    with torch.no_grad():
        streams = [tiny_model().eval()(one).logits[0, 1:3].double() for one in (ids, other)]
    z = 0.7 * streams[0] + 0.3 * streams[1]
    expected = z.log_softmax(dim=-1)[[0, 1], [6, 7]]
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
