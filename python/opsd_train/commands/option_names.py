"""The options of a run, and whether they take a value, read from the sources: importing takes seconds."""

import ast
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Where the classes are that have the options, and one that another package hands on from elsewhere.
HOMES = {"RunOptions": "opsd_train.run_options", "OPSDConfig": "opsd_train.config"}
MOVED = {("transformers", "TrainingArguments"): "transformers.training_args"}
KINDS = tuple(HOMES)
OF_THE_DEMO = "OPSDConfig"  # which has a model and rows of its own


def options(kinds: Sequence[str] = KINDS) -> dict[str, str]:
    """Every field of the named dataclasses, and what stands behind it on the command line.

    That is a `value`, `several`, perhaps yes or no for a `switch`, or `perhaps` another one.
    """
    return {name: kind for one in kinds for name, kind in _fields(HOMES[one], one).items()}


@functools.cache
def _fields(module: str, name: str) -> dict[str, str]:
    """The fields of a dataclass and of those that it is derived from."""
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    (definition,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    homes = {one: home for node in tree.body for one, home in _imported(node)}
    found: dict[str, str] = {}
    for base in reversed(definition.bases):
        if isinstance(base, ast.Name) and base.id in homes:
            found |= _fields(homes[base.id], base.id)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_given(node):
            found[node.target.id] = _takes(ast.unparse(node.annotation), node.value)
    return found


def _takes(annotation: str, value: ast.expr | None) -> str:
    """By the type that is left of a union, and whether the default says it."""
    if _metadata(value, "nargs") == "?":
        return "perhaps"
    parts = [part.strip() for part in annotation.split("|")]
    if "None" not in parts:
        kind = parts[0] if parts[-1] == "str" else parts[min(1, len(parts) - 1)]
    elif "bool" in parts:
        return "value" if _is_none(value) else "switch"
    else:
        kind = parts[0] if parts[1] == "None" else parts[1]
    return "switch" if kind == "bool" else "several" if kind.startswith("list") else "value"


def _is_none(value: ast.expr | None) -> bool:
    """Whether a field's default is None, written down or given to `option` or `field`."""
    if isinstance(value, ast.Call):
        named = [word.value for word in value.keywords if word.arg == "default"]
        value = next(iter([*named, *value.args]), None)
    return isinstance(value, ast.Constant) and value.value is None


def _metadata(value: ast.expr | None, name: str) -> Any:
    """An entry of a field's metadata, if it is a constant."""
    for word in value.keywords if isinstance(value, ast.Call) else ():
        if word.arg == "metadata" and isinstance(word.value, ast.Dict):
            for key, held in zip(word.value.keys, word.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name and isinstance(held, ast.Constant):
                    return held.value
    return None


def _imported(node: ast.stmt) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            yield alias.name, MOVED.get((node.module, alias.name), node.module)


def _is_given(field: ast.AnnAssign) -> bool:
    """Whether it is a field that a caller gives: no constant of the class, none that the class computes."""
    computed = isinstance(field.value, ast.Call) and any(
        word.arg == "init" and isinstance(word.value, ast.Constant) and word.value.value is False
        for word in field.value.keywords
    )
    return "ClassVar" not in ast.unparse(field.annotation) and not computed


def _source(module: str) -> Path:
    """The file of a module; only its package is looked up, and nothing imported."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"options: expected the package {package}, which opsd-kernels[train] brings")
    return Path(spec.origin).parent.joinpath(*parts).with_suffix(".py")
