"""Rows that cannot be used: named and stopped at, or set aside and counted; never lost."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from driver_tiny import ROWS, TOKENIZER, tiny_config, tiny_model
from opsd_train.data import quarantine
from opsd_train.data.quarantine import BAD_ROWS, Quarantine
from opsd_train.data.rows import Reading, load_rows
from opsd_train.reading.prompts import Encoder, Templates
from opsd_train.run_folder import check_output
from opsd_train.run_options import RunOptions
from opsd_train.train import run, train

TEMPLATES = Templates("{problem}", "{solution};{problem}", "{privileged_context};{prompt}")
GOOD = b'{"problem": "1+2=", "solution": "3"}'
TURNS = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
DEEP = b"[" * 100_000


def line(**record: object) -> bytes:
    return json.dumps(record).encode()


BAD = {
    "invalid JSON": (b'{"problem": "1+2="', "expected a JSON object, got '{"),
    "not an object": (b'["1+2=", "3"]', "expected a JSON object, got a list"),
    "nested too deeply": (DEEP, "expected a JSON object, got"),
    "a number that JSON has not": (b'{"problem": "1+2=", "solution": "3", "answer": NaN}', "NaN is not JSON"),
    "no such column": (line(problem="1+2="), "column 'solution', got no such column"),
    "no convention": (line(question="1+2="), "expected columns problem and solution"),
    "empty text": (line(problem=" ", solution="3"), "column 'problem', got ' '"),
    "wrong type": (line(problem="1+2=", solution=3), "column 'solution', got 3"),
    "null": (line(problem="1+2=", solution=None), "column 'solution', got None"),
    "malformed messages": (line(prompt=[{"role": "user"}], teacher_prompt="3"), "messages with a role and"),
    "ends in the assistant's turn": (line(prompt=TURNS, teacher_prompt="3"), "before the assistant's turn"),
    "answer of another type": (line(problem="1+2=", solution="3", answer=[3]), "column 'answer', got [3]"),
    "invalid UTF-8": (b'{"problem": "1+2=\xff", "solution": "3"}', "expected UTF-8, got the byte 0xff"),
    "half a character": (b'{"problem": "1+2=\\ud800", "solution": "3"}', "lone surrogate U+D800"),
    "the same again": (GOOD, "expected each row once, got that of"),
    "over the student's budget": (line(problem="1" * 30 + "=", solution="3"), "the student's has 33 tokens"),
    "over the teacher's budget": (line(problem="1=", solution="3" * 40), "the teacher's 45"),
    "over the model's positions": (line(problem="1=", solution="3" * 34), "with a completion of 6 (max_comp"),
    "not in the vocabulary": (line(problem="one", solution="3"), "student_template: expected text that"),
}


def encode(path: Path, refuse: quarantine.Refuse) -> list[str]:
    """Places of the rows that are left."""
    rows = load_rows(path, TEMPLATES, reading=Reading(refuse=refuse, repeats=False))
    encoder = Encoder(TOKENIZER, 24, 40, max_completion_length=6, positions=44)
    prompts = encoder.encode(rows, refuse)
    return [prompt.where for prompt in prompts]


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(one + b"\n" for one in lines))
    return path


@pytest.mark.parametrize("kind", BAD)
def test_bad_row_stops_by_default_with_file_and_line(tmp_path: Path, kind: str) -> None:
    bad, message = BAD[kind]
    path = write(tmp_path / "rows.jsonl", GOOD, b"", bad)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        encode(path, quarantine.stop)
    assert str(caught.value).startswith(f"{path} line 3: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", BAD)
def test_bad_row_is_set_aside_as_it_was(tmp_path: Path, kind: str) -> None:
    bad, message = BAD[kind]
    path = write(tmp_path / "rows.jsonl", GOOD, bad, line(problem="2+2=", solution="4"))
    refuse = Quarantine(tmp_path / "run", limit=1)
    assert encode(path, refuse) == [f"{path} line 1", f"{path} line 3"]
    (entry,) = [json.loads(text) for text in (tmp_path / "run" / BAD_ROWS).read_text().splitlines()]
    assert entry["where"] == f"{path} line 2"
    assert message in entry["reason"]
    raw = entry["row"]
    if isinstance(raw, str):
        assert raw.encode("utf-8", "surrogateescape") == bad
    else:
        assert raw == json.loads(bad)
    assert quarantine.count(tmp_path / "run") == len(refuse) == 1


@pytest.mark.parametrize(
    ("cells", "reason", "raw"),
    [
        (b"2+2=,4,5", "expected 2 cells, got 3", "2+2=,4,5"),
        (b'"2"+2=,4', "expected comma-separated values", '"2"+2=,4'),
        (b"2+\xfe2=,4", "expected UTF-8, got the byte 0xfe", "2+\udcfe2=,4"),
        (b"2+2=,", "column 'solution', got None", {"problem": "2+2=", "solution": None}),
    ],
)
def test_bad_cells_are_set_aside_as_they_were(tmp_path: Path, cells: bytes, reason: str, raw: object) -> None:
    path = write(tmp_path / "rows.csv", b"problem,solution", b"1+2=,3", cells, b"3+3=,6")
    refuse = Quarantine(tmp_path, limit=1)
    rows = load_rows(path, TEMPLATES, reading=Reading(refuse=refuse))
    assert [row.where for row in rows] == [f"{path} line 2", f"{path} line 4"]
    (entry,) = refuse.entries
    assert entry["where"] == f"{path} line 3"
    assert reason in entry["reason"]
    assert (entry["row"].rstrip("\n") if isinstance(raw, str) else entry["row"]) == raw


def test_one_more_than_the_limit_stops_and_all_are_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"{", GOOD, b"[]", line(problem="1" * 30, solution="3"))
    encode(path, Quarantine(tmp_path / "three", limit=3))
    with pytest.raises(ValueError, match=r"at most 2 bad rows, found one more: .* line 4: .*bad_rows\.jsonl"):
        encode(path, Quarantine(tmp_path / "two", limit=2))
    assert quarantine.count(tmp_path / "two") == 3
    assert quarantine.count(tmp_path / "none") == 0
    with pytest.raises(ValueError, match="skip_bad_rows: expected a number of at least 0, got -1"):
        RunOptions(model="m", data="d", skip_bad_rows=-1)


def test_resuming_keeps_what_was_set_aside_and_a_fresh_start_does_not(tmp_path: Path) -> None:
    Quarantine(tmp_path, limit=5)("a: wrong", "a", "x")
    again = Quarantine(tmp_path, limit=5, resumes=True)
    again("a: wrong", "a", "x")
    again("b: wrong", "b", {"path": tmp_path})  # what JSON has no form for is written as text
    kept = (tmp_path / BAD_ROWS).read_text().splitlines()
    assert [json.loads(text)["where"] for text in kept] == ["a", "b"]
    Quarantine(tmp_path, limit=5, resumes=True, writes=False)("c: wrong", "c", "x")
    assert quarantine.count(tmp_path) == 2
    Quarantine(tmp_path, limit=5)
    assert quarantine.count(tmp_path) == 0


def test_only_bad_rows_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"{", b"[]")
    with pytest.raises(ValueError, match=r"at least one row in .*rows\.jsonl, got none"):
        encode(path, Quarantine(tmp_path, limit=9))


def test_a_run_counts_what_it_set_aside_and_resumes(tmp_path: Path) -> None:
    tiny_model(max_position_embeddings=60).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    good = [line(**row) for row in ROWS]
    rows = write(tmp_path / "rows.jsonl", *good[:4], b"{", *good[4:], line(problem="1" * 90, solution="3"))
    with rows.open("ab") as file:
        file.write(line(problem="1=", solution="3" * 51) + b"\n")  # within its budget, beyond the positions
    out = tmp_path / "out"
    model = str(tmp_path / "model")
    strict = RunOptions(model=model, data=str(rows), skip_bad_rows=1)
    settings = {"max_prompt_length": 60, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match="at most 1 bad rows, found one more"):
        train(strict, tiny_config(out, **settings), Console(quiet=True))
    check_output(out, "error")  # what was set aside does not make the folder a run
    options = RunOptions(model=model, data=str(rows), skip_bad_rows=3)
    trainer = train(options, tiny_config(out, **settings), Console(quiet=True))
    assert len(trainer.prompts) == 8
    run(trainer, {"name": "n", "model": "m"}, Console(quiet=True))
    info = json.loads((out / "run.json").read_text())
    assert info["rows"] == {"training": 8, "held_out": 0, "set_aside": 3}
    settings |= {"max_steps": 3, "resume_from_checkpoint": "last"}
    trainer = train(options, tiny_config(out, **settings), Console(quiet=True))
    run(trainer, {"name": "n", "model": "m"}, Console(quiet=True), existing="resume")
    assert trainer.state.global_step == 3
    assert quarantine.count(out) == 3
    alone = write(tmp_path / "alone.jsonl", line(problem="1=", solution="3" * 51))
    options = RunOptions(model=model, data=str(alone), skip_bad_rows=3)
    with pytest.raises(ValueError, match="data: expected at least one row that fits, got none of 1"):
        train(options, tiny_config(tmp_path / "none"), Console(quiet=True))


@pytest.mark.parametrize(("resumes", "writes", "kept"), [(0, 1, False), (1, 1, True), (0, 0, True)])
def test_only_a_new_run_and_its_first_process_begin_the_file_anew(
    tmp_path: Path, resumes: int, writes: int, kept: bool
) -> None:
    held = tmp_path / BAD_ROWS
    held.write_text("{}\n")
    Quarantine(tmp_path, 1, bool(resumes), bool(writes))
    assert held.exists() == kept
