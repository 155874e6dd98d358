"""Nothing that is loaded can run code: no pickle, no code from a model's folder."""

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from driver_tiny import TOKENIZER, tiny_model, tiny_trainer
from opsd_train.loading import load, with_lora
from opsd_train.safety.checkpoints import checkpoint_of

ROOT = Path(__file__).parent.parent
SOURCES = [
    path for part in ("opsd_kernels", "python", "bench") for path in sorted((ROOT / part).rglob("*.py"))
]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    "torch.save",
    "torch.load",
    "torch.jit.load",
    "torch.package",
    "torch.hub.load",
    "pandas.read_pickle",
}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
OWN_TABLE = ("opsd_kernels/divergences.py", "opsd_kernels/backends/triton/terms.py")
# A builder of `datasets` has no such argument, nor code to trust: it refuses data sets with a script.
LOADERS = ("from_pretrained", "from_config", "load_dataset", "pipeline")


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What in a file's source could run code that is in a file it loads."""
    for node in ast.walk(tree):
        for name in imported(node):
            if name.split(".")[0] in MODULES or name in CALLS:
                yield f"line {node.lineno}: imports {name}"  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        name, where = dotted(node.func), f"line {node.lineno}: "
        last = name.rsplit(".", 1)[-1]
        given = {one.arg: one.value for one in node.keywords}
        trust = given.get("trust_remote_code")
        says = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
        if name in CALLS or name in BUILT_IN:
            yield where + name
        if last == "load" and "allow_pickle" in given and says.get("allow_pickle") is not False:
            yield where + "allow_pickle"
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield where + name
        if "trust_remote_code" in given and says.get("trust_remote_code") is not False:
            yield where + "trust_remote_code"
        # PEFT's own loader has no such argument, and runs none.
        if last in LOADERS and trust is None and name != "PeftModel.from_pretrained":
            yield where + f"{name} without trust_remote_code=False"
        if (
            last == "from_pretrained"
            and name.startswith("AutoModel")
            and says.get("use_safetensors") is not True
        ):
            yield where + f"{name} without use_safetensors=True"


def test_no_source_can_load_code() -> None:
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    found = {name: list(unsafe(tree)) for name, tree in trees.items()}
    assert len(found) > 150
    for name in OWN_TABLE:  # the terms of divergences.def, a part of the package, become functions
        assert all(one.split(": ")[1] in BUILT_IN for one in found.pop(name))
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "import joblib.numpy_pickle",
        "torch.save(model, path)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, use_safetensors=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=trust)",
        "datasets.load_dataset(path)",
        "eval(text)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_the_check_of_sources_sees(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


class Payload:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def planted(path: Path, proof: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(proof)))


def test_the_payload_works(tmp_path: Path) -> None:
    planted(tmp_path / "file", tmp_path / "proof")
    pickle.loads((tmp_path / "file").read_bytes())
    assert (tmp_path / "proof").exists()


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_model_of_a_pickle_alone_is_refused(model_folder: Path, tmp_path: Path) -> None:
    load(str(model_folder))
    (model_folder / "model.safetensors").unlink()
    planted(model_folder / "pytorch_model.bin", tmp_path / "proof")
    with pytest.raises(ValueError, match=r"model: expected a causal language model at .*safetensors"):
        load(str(model_folder))
    torch.save(tiny_model().state_dict(), model_folder / "pytorch_model.bin")  # nor an honest one
    with pytest.raises(ValueError, match=r"model: expected a causal language model at .*safetensors"):
        load(str(model_folder))
    assert not (tmp_path / "proof").exists()


def test_adapters_of_a_pickle_alone_are_refused(model_folder: Path, tmp_path: Path) -> None:
    model, _ = load(str(model_folder))
    adapters = tmp_path / "adapters"
    with_lora(model, 2, 4, 0.0).save_pretrained(adapters)
    TOKENIZER.save_pretrained(adapters)
    (adapters / "adapter_model.safetensors").unlink()
    planted(adapters / "adapter_model.bin", tmp_path / "proof")
    with pytest.raises(ValueError, match=r"model: expected adapter_model\.safetensors in"):
        load(str(adapters))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("model_type", ["qwen3", "unheard_of"])
def test_code_in_a_model_folder_never_runs(model_folder: Path, tmp_path: Path, model_type: str) -> None:
    code = f"from pathlib import Path\nPath({str(tmp_path / 'proof')!r}).touch()\n"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (model_folder / f"{name}.py").write_text(code)
    config = json.loads((model_folder / "config.json").read_text())
    mapped = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    config |= {"model_type": model_type, "auto_map": mapped}
    (model_folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model_folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.Own"]}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if model_type == "qwen3":
        load(str(model_folder))
    else:
        with pytest.raises(ValueError, match="model: expected a causal language model"):
            load(str(model_folder))
    assert not (tmp_path / "proof").exists()


def forbidden(*arguments: Any, **named: Any) -> None:
    raise AssertionError("a pickle is written or read")


def test_checkpoints_neither_hold_nor_open_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((torch, "save"), (torch, "load"), (pickle, "load"), (pickle, "dump")):
        monkeypatch.setattr(module, name, forbidden)
    settings = {"save_strategy": "steps", "save_steps": 1, "teacher": "ema"}
    trainer = tiny_trainer(tmp_path, max_steps=2, **settings)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt", ".model"}
    checkpoint = tmp_path / "checkpoint-1"
    names = (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "pytorch_model.bin",
        "scaler.pt",
    )
    for name in names:
        planted(checkpoint / name, tmp_path / "proof")
    again = tiny_trainer(tmp_path / "again", max_steps=2, **settings)
    again.train(resume_from_checkpoint=checkpoint)
    assert not (tmp_path / "proof").exists()
    assert not set(names) & {path.name for path in (tmp_path / "again").rglob("*")}
    whole, resumed = (path / "checkpoint-2" / "model.safetensors" for path in (tmp_path, tmp_path / "again"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_checkpoints_of_transformers_are_refused(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    for path in [*checkpoint.glob("optimizer.*"), *checkpoint.glob("rank-*"), checkpoint / "complete.json"]:
        path.unlink()
    planted(checkpoint / "optimizer.pt", tmp_path / "proof")
    planted(checkpoint / "training_args.bin", tmp_path / "proof")
    with pytest.raises(ValueError, match=r"a checkpoint of this driver, .* has optimizer.pt, training_args"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"found none; not whole: checkpoint-1 \(complete.json is missing"):
        checkpoint_of(True, tmp_path)
    assert not (tmp_path / "proof").exists()
    shutil.rmtree(checkpoint)
