"""What a row says reaches the model or is refused: numbers, keys, tools, calls, thoughts, lengths."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from driver_tiny import TOKENIZER
from opsd_train.commands.options import parse
from opsd_train.config import OPSDConfig
from opsd_train.data.rows import load_rows
from opsd_train.reading.contexts import Attempt, Context, Known
from opsd_train.reading.prompts import Encoder, Templates
from opsd_train.reading.texts import without_thoughts
from opsd_train.reading.thoughts import Thoughts

TEMPLATES = Templates("{problem}", "{solution};{problem}", "{privileged_context};{prompt}")
CALL = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
TALKS = CHAT.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")


def bytes_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a merge, so that a character is a token."""
    alphabet = {sign: at for at, sign in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", chat_template=template
    )


@pytest.mark.parametrize("suffix", ["parquet", "list"])
def test_an_answer_that_is_no_number_is_a_null(tmp_path: Path, suffix: str) -> None:
    records: Any = [{"problem": "1+2=", "solution": "3", "answer": a} for a in (3.5, float("nan"))]
    if suffix == "parquet":
        pandas.DataFrame(records).to_parquet(tmp_path / "rows.parquet")
        records = tmp_path / "rows.parquet"
    assert [row.answer for row in load_rows(records, TEMPLATES)] == ["3.5", "3"]
    with pytest.raises(ValueError, match="finite number in column 'answer', got inf"):
        load_rows([{"problem": "1=", "solution": "1", "answer": float("inf")}], TEMPLATES)


def test_a_key_that_comes_twice_names_its_line(tmp_path: Path) -> None:
    row = '{"problem": "1=", "solution": "1"}'
    twice = '{"problem": "1=", "solution": "1", "solution": "2"}'
    for name, text in (("a.jsonl", f"{row}\n{twice}"), ("a.json", f"[{row},\n{twice}]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} line 2: .*each key once.*'solution' twice"):
            load_rows(tmp_path / name, TEMPLATES)
    (tmp_path / "a.yaml").write_text("seed: 1\nmax_steps: 2\nseed: 3\n")
    with pytest.raises(ValueError, match=r"(?s)each key once, got 'seed' again.*line 3"):
        parse((OPSDConfig,), [tmp_path / "a.yaml"], [])
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"output_dir": "x", "max_steps": 2}))
    assert parse((OPSDConfig,), [tmp_path / "a.yaml"], ["--use_cpu"])[0].max_steps == 2


def chat(**more: Any) -> dict[str, Any]:
    prompt = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": None} | more,
        {"role": "tool", "content": "2"},
    ]
    return {"prompt": prompt, "privileged_context": "2"}


def test_calls_and_tools_reach_the_chat_template() -> None:
    template = TALKS + "{{ tools | tojson if tools }}"
    encoder = Encoder(bytes_tokenizer(template), 500, 500)
    rows = load_rows([chat(tool_calls=CALL) | {"tools": json.dumps(CALL)}], TEMPLATES)
    for ids in (encoder.encode(rows)[0].student_ids, encoder.encode(rows)[0].teacher_ids):
        text = encoder.tokenizer.decode(list(ids))
        assert json.dumps(CALL) in text
        assert text.endswith(json.dumps(CALL))


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (chat(tool_calls=CALL), "tool_calls"),
        (chat(content="2", reasoning_content="1+1"), "reasoning_content"),
        (chat(content="2") | {"tools": CALL}, "tools"),
    ],
)
def test_a_template_without_words_for_them_refuses_the_row(record: dict[str, Any], name: str) -> None:
    rows = load_rows([record], TEMPLATES)
    with pytest.raises(ValueError, match=f"row 1: .*it has none for '{name}'"):
        Encoder(bytes_tokenizer(CHAT), 500, 500).encode(rows)


def test_prompts_do_not_end_in_what_the_tokenizer_appends() -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", 0)]
    )
    rows = load_rows([{"problem": "12", "solution": "3"}], TEMPLATES)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        prompt = Encoder(tokenizer, 50, 50).encode(rows * 3)[0]
    assert prompt.student_ids == (0, *tokenizer("12", add_special_tokens=False)["input_ids"])
    assert [str(one.message)[:36] for one in said] == ["the tokenizer ends every text in <eos>"[:36]]


def test_a_row_of_a_million_characters_is_refused_at_once() -> None:
    rows = load_rows([{"problem": "1" * 1_000_000, "solution": "3"}], TEMPLATES)
    start = time.process_time()
    with pytest.raises(
        ValueError, match=r"row 1: .*student's has at least \d+ tokens \(max_prompt_length 50\)"
    ):
        Encoder(bytes_tokenizer(), 50, 50).encode(rows)
    assert time.process_time() - start < 2
    fits = load_rows([{"problem": "1" * 40 + " " * 1000, "solution": "3"}], TEMPLATES)
    assert len(Encoder(bytes_tokenizer(), 1040, 1100).encode(fits)) == 1


PAIRS = [
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
]


@pytest.mark.parametrize(("begin", "end"), PAIRS)
def test_thoughts_are_cut_in_the_markers_of_the_template(begin: str, end: str) -> None:
    shown = CHAT + "{# " + begin + " " + end + " #}"
    inside = bytes_tokenizer(shown.replace("[assistant]", "[assistant]" + begin))
    for tokenizer, opened in ((bytes_tokenizer(shown), False), (inside, True)):
        tokenizer.add_special_tokens({"additional_special_tokens": [begin, end]})
        thoughts = Thoughts.of(tokenizer, {})
        assert thoughts.opened is opened
        for text, left in (
            (f"2+2, maybe 5?\n{end}\n\nThe answer is 4.<eos>", "The answer is 4."),
            (f"{begin}maybe 5?{end}It is 4.", "It is 4."),
            (f"{begin}maybe 5", ""),
            ("It is 4.", "" if opened else "It is 4."),
        ):
            assert thoughts.left_out(tokenizer(text)["input_ids"]) == left


def test_siblings_show_what_was_said() -> None:
    thought = Attempt("2+2, maybe 5?\n</think>\n\nThe answer is 4.", 1.0)
    known = Known("2+2=", "2+2=", {}, Attempt("5", 0.0), (thought,))
    told = Context("sibling")(known)
    assert told is not None
    assert "maybe 5?" not in told
    assert "The answer is 4." in told
    assert without_thoughts("It is 4.", opened=True) == ""


def test_a_fallback_has_the_templates_of_the_run() -> None:
    known = Known("2+2=", "2+2=", {"answer": "4"})
    own = "{problem} in steps: {steps} so {answer}"
    assert Context("partial_solution", {"template": own})(known) == "2+2= in steps:  so 4"
    config = OPSDConfig(
        output_dir="x",
        use_cpu=True,
        method="opsd",
        contexts={"teacher": "partial_solution"},
        context_templates={"partial_solution": own, "answer_only": "{problem} is {answer}"},
    )
    method = config.to_method(Encoder(TOKENIZER, 20, 20))
    assert method is not None
    assert method.roles.contexts["teacher"](known) == "2+2= is 4"
