"""The files of a model: read, and what is wrong with them in one line that names the file."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

# Of a folder, those that are read as JSON and have to be objects.
OBJECTS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


def check_files(folder: Path) -> None:
    """Look at JSON files, and at the headers of weights. ValueError names the first that cannot be read."""
    for path in [folder / name for name in OBJECTS] + sorted(folder.glob("*.safetensors.index.json")):
        if path.is_file():
            _object(path)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        parts = _object(index).get("weight_map")
        if not isinstance(parts, dict):
            raise ValueError(f"model: expected a weight_map in {index}, got {type(parts).__name__}")
        for name in sorted(set(parts.values())):
            if not (folder / name).is_file():
                raise ValueError(f"model: expected {name}, which {index} names, in {folder}; it is not there")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model: expected whole safetensors in {path}; {error}") from None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON that is cut off, or bytes that are not UTF-8
        raise ValueError(f"model: expected JSON in {path}; {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"model: expected an object in {path}, got {json.dumps(found)[:40]}")
    return found


@contextmanager
def expected(what: str, model: str, file: str) -> Iterator[None]:
    """Inside, whatever another package makes of broken files is one line: a ValueError that names the file.

    They have no kind of error in common: tokenizers raises plain `Exception`.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"model: expected {what} at {model!r} ({file}); {said}") from error


def configuration(model: str, **where: Any) -> PreTrainedConfig:
    """The configuration of a model. ValueError for one that transformers does not take."""
    with expected("a causal language model", model, where.get("gguf_file") or "config.json"):
        return AutoConfig.from_pretrained(model, trust_remote_code=False, **where)


def from_files(model: str, **how: Any) -> PreTrainedModel:
    """A causal language model with all of its weights; code that comes with a model is never run.

    Args:
        model: a local folder or a hub id.
        how: for `from_pretrained`.

    Raises:
        ValueError: files that cannot be read, and weights that are not those of the configuration. They are
            neither made up nor left out.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what does not fit is said below, in one line
    try:
        with expected("a causal language model", model, how["gguf_file"] or "weights in safetensors"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **how,
            )
    finally:
        transformers_logging.set_verbosity(before)
    found: PreTrainedModel = loaded[0]
    _check_weights(model, found, loaded[1])
    return found


def _check_weights(model: str, found: PreTrainedModel, told: Mapping[str, Any]) -> None:
    where = f"model: expected the weights at {model!r} to be those of its config.json"
    for name, there, here in sorted(told["mismatched_keys"]):
        raise ValueError(f"{where}; {name} is {tuple(there)} there and {tuple(here)} by the configuration")
    if told["missing_keys"]:
        raise ValueError(
            f"{where}; {len(told['missing_keys'])} are missing, {sorted(told['missing_keys'])[0]}"
        )
    unused, own = sorted(told["unexpected_keys"]), {_numbered(name) for name in found.state_dict()}
    more = [name for name in unused if _numbered(name) in own]
    if more:
        raise ValueError(f"{where}; {len(more)} are of further layers, {more[0]}")
    if unused:
        warnings.warn(f"{model}: {len(unused)} weights are not used, {unused[0]}", stacklevel=3)


def _numbered(name: str) -> str:
    """A name without the numbers of its layers."""
    return re.sub(r"\.\d+(?=\.)", ".#", name)
