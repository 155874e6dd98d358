"""A method's name is a promise: `opsd train` minimises it, or refuses and says what is missing."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from driver_tiny import tiny_config
from opsd_kernels import methods
from opsd_kernels.methods.supplies import LIBRARY, MADE, NAMED, POOLED, PUBLISHED, supplies
from opsd_train.commands.main import app
from opsd_train.data.columns import step_column
from opsd_train.method import OWN, POOL, SCORED

# Entries that the driver has not everything for: whose completions, models or modalities are others.
ELSEWHERE = {
    "kepo", "gdsd", "spd", "vision_opd", "pf_opsd", "opcod", "caopd", "cord", "vpd", "minillm", "distillm2",
    "deepseek_v4", "mimo_mopd", "user_hindsight", "mixsd", "pi_distill", "ccopd", "d_opsd", "rltf_sd",
    "vla_opd", "mad_opd", "brts", "curiosft", "tropd",
}  # fmt: skip
TOLD = {
    "oracle", "tt_opd", "omniopd", "selectkd", "step_critique", "trace", "skill_sd", "rcsd", "distil", "sod",
    "tcod", "listopd", "sgsd", "selfci",
}  # fmt: skip
# What a run has to be given beside the method's name, before anything else can be wrong.
GIVEN: dict[str, dict[str, Any]] = {
    "dp_opd": {"private": "{}"},
    "sparse_opd": {"subnetwork": "a-run"},
    "atesd": {"exposure": "{}"},
    "effopd": {"extrapolate": 8},
    "lightning_opd": {"offline": "a-cache"},
    "tcod": {"turns": "{}", "annotator": "judge:columns"},
    "sgsd": {"pool": ["skill"]},
    "unisd": {"pool": ["sibling"]},
} | {
    key: {"annotator": "judge:columns"} for key in ("sod", "tt_opd", "omniopd", "selectkd", "listopd")
}  # fmt: skip


@pytest.mark.parametrize("key", methods.names())
def test_every_entry_runs_with_what_it_names_or_is_refused(tmp_path: Path, key: str) -> None:
    state = LIBRARY if key in ELSEWHERE else NAMED if key in TOLD else PUBLISHED
    assert supplies(key).state == state
    if state == LIBRARY:
        with pytest.raises(ValueError, match=rf"^method: .*'{key}' is for the library only .* needs "):
            tiny_config(tmp_path, method=key)
        return
    given = GIVEN.get(key, {})
    for name in given:
        some = {other: value for other, value in given.items() if other != name}
        with pytest.raises(ValueError, match=rf"^({name}|turns): expected (.*'{key}'|an annotator)"):
            tiny_config(tmp_path, method=key, **some)
    assert tiny_config(tmp_path, method=key, **given).method == key


@pytest.mark.parametrize(
    ("key", "options"),
    [("pi_distill", {"side": "on_policy"}), ("minillm", {"share": None}), ("tropd", {"guidance": 0})],
)
def test_options_that_need_nobody_else(tmp_path: Path, key: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"or --method-options '{.*}' without them"):
        tiny_config(tmp_path, method=key)
    assert tiny_config(tmp_path, method=key, method_options=json.dumps(options)).method == key


def test_what_the_table_takes_for_made_is_what_the_driver_makes() -> None:
    """`turn` alone is made and not counted on: it is 0 everywhere, which is one turn."""
    assert {*MADE, "turn"} == {*step_column.functions, *SCORED, *OWN}
    assert POOLED == POOL


def test_the_command_refuses_and_lists(tmp_path: Path) -> None:
    run = CliRunner()
    data = tmp_path / "rows.jsonl"
    data.write_text('{"problem": "1+1=", "solution": "2"}\n')
    arguments = ["train", "--data", str(data), "--model", str(tmp_path), "--out", str(tmp_path / "run")]
    refused = run.invoke(app, [*arguments, "--method", "mixsd"])
    assert refused.exit_code != 0
    assert "for the library only" in " ".join(refused.output.split())
    listed = run.invoke(app, ["methods"]).output
    found = Counter({state: listed.count(f"    {state}") for state in (PUBLISHED, NAMED, LIBRARY)})
    assert found[LIBRARY] == len(ELSEWHERE)
    assert found[NAMED] == len(TOLD)
    assert found.total() == len(methods.names())
