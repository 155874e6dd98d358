"""What a command finds where it is to write: what somebody made is replaced by the same command alone."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from driver_tiny import ROWS
from opsd_train.commands.main import app
from opsd_train.demo.run import MODEL
from opsd_train.evaluation.run import WRITTEN
from opsd_train.run_folder import check_begun, check_output, of_its_own
from opsd_train.safety.lock import FolderLock
from opsd_train.studies.compare_report import RESULTS, check_results
from opsd_train.studies.compare_results import Comparison

COMMANDS = {
    "demo": ["demo", "--steps", "1"],
    "train": ["train", "--model", str(MODEL), "--data", "{rows}", "--use-cpu", "--max-steps", "1"],
    "compare": ["compare", "--methods", "forward_kl", "--steps", "1", "--samples", "1", "--k", "1"],
    "eval": ["eval", "--model", str(MODEL), "--data", "{rows}", "--use-cpu"],
    "cache": ["cache", "--demo", "--use-cpu"],
    "diagnose": ["diagnose", "--demo", "--use-cpu"],
}
RUN = {"name": "kept", "config": {}}


def invoke(command: str, tmp_path: Path, out: Path) -> tuple[int, str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROWS[0]) + "\n")
    words = [word.format(rows=rows) for word in COMMANDS[command]]
    result = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def run_of(folder: Path, **info: str) -> dict[str, bytes]:
    """A finished run, and its files as they are."""
    (folder / "model").mkdir(parents=True)
    files = {"run.json": json.dumps(RUN | info), "metrics.jsonl": "", "model/config.json": "{}"}
    for name, text in files.items():
        (folder / name).write_text(text)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("by", ["opsd train", "opsd compare", None])
@pytest.mark.parametrize("command", ["demo", "train"])
def test_a_run_is_not_replaced_by_another_command(tmp_path: Path, command: str, by: str | None) -> None:
    out = tmp_path / "run"
    before = run_of(out, **({} if by is None else {"command": by}))
    code, said = invoke(command, tmp_path, out)
    assert code == 2
    assert said.startswith("error: out: ")
    assert "choose another folder" in said
    assert contents(out) == before


def test_the_demo_replaces_an_earlier_demo_alone(tmp_path: Path) -> None:
    run_of(tmp_path / "demo", command="opsd demo")
    check_output(tmp_path / "demo", "replace", "opsd demo")
    run_of(tmp_path / "train", command="opsd train")
    with pytest.raises(ValueError, match=r"out: .*earlier run of `opsd demo`, .* holds one of `opsd train`"):
        check_output(tmp_path / "train", "replace", "opsd demo")


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("compare", ("forward_kl-seed0/run.json", "forward_kl-seed0/model/model.safetensors")),
        ("compare", ("compare.json",)),
        ("compare", ("compare.png",)),
        ("eval", ("eval.json",)),
        ("eval", ("completions/eval.parquet",)),
        ("cache", ("shard-00000.parquet",)),
        ("demo", ("notes.txt",)),
        ("train", ("notes.txt",)),
    ],
)
def test_what_somebody_made_stays(tmp_path: Path, command: str, names: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"mine": 1}')
    before = contents(out)
    code, said = invoke(command, tmp_path, out)
    assert code == 2
    assert said.splitlines()[-1].startswith("error: out: ")
    assert contents(out) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_the_place_of_the_output_is_told_by_the_option(tmp_path: Path, command: str) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    for place in (out, out / "below"):
        new = command == "diagnose" and place == out
        expected = "a file that is not there yet, got" if new else "a folder, got the file"
        code, said = invoke(command, tmp_path, place)
        assert (code, said.startswith(f"error: out: expected {expected} {out}")) == (2, True)
    assert out.read_text() == "mine"


def test_a_comparison_s_own_results_are_renewed(tmp_path: Path) -> None:
    check_results(tmp_path / "none")
    (tmp_path / RESULTS[0]).write_text(json.dumps(dict.fromkeys(Comparison.__annotations__)))
    check_results(tmp_path)


def test_an_evaluation_without_a_folder_finds_its_own(tmp_path: Path) -> None:
    first = tmp_path / "opsd-eval"
    assert of_its_own(first, WRITTEN) == first
    for name, found in (("opsd-eval", "opsd-eval-2"), ("opsd-eval-2", "opsd-eval-3")):
        (tmp_path / name).mkdir()
        (tmp_path / name / WRITTEN[0]).write_text("{}")
        assert of_its_own(first, WRITTEN) == tmp_path / found


def test_a_run_that_ended_without_a_checkpoint_is_not_begun_again(tmp_path: Path) -> None:
    check_begun(tmp_path)
    before = run_of(tmp_path / "run", command="opsd train")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: expected a checkpoint .* choose another"):
        check_begun(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_the_lock_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^out: expected a folder to write to, got .*file"):
        FolderLock(tmp_path / "file")
