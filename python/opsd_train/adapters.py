"""LoRA adapters on a model: fresh ones, those of a folder to go on from or to merge, and a teacher's copy."""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Conv1D, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BESIDE = (
    "trained_beside_adapters.safetensors"  # parameters that were trained too and that PEFT does not write
)
TEACHER = "initial_teacher"  # adapters of a name that begins so are frozen, and no part of the student
ADAPTED = BaseTunerLayer | ModulesToSaveWrapper
ALPHA, DROPOUT = 32.0, 0.0  # of fresh adapters


@dataclass(frozen=True)
class Adapter:
    """Adapters in a folder, or under a hub id.

    Args:
        name: the folder or the id.
        base: folder or hub id of the model they were trained on.
        base_revision: commit, tag or branch of that one, if they name it.
        kind: PEFT's name of what they are: `LORA`.
    """

    name: str
    base: str
    base_revision: str | None
    kind: str


@dataclass(frozen=True)
class Wanted:
    """The LoRA adapters that were asked for; None is what the adapters of a folder have, or the default.

    Args:
        rank: 0 asks for none.
        alpha: updates scale with alpha / rank.
        dropout: in front of the adapters.
    """

    rank: int = 0
    alpha: float | None = None
    dropout: float | None = None


def adapter_at(model: str, revision: str | None = None) -> Adapter | None:
    """The adapters in a folder or under a hub id, None for a model of its own.

    Raises ValueError for a configuration that says nothing of the model below, or cannot be read.
    """
    path = find_adapter_config_file(model, revision=revision)
    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: expected JSON in {path}; {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"model: expected an object in {path}, got {type(found).__name__}")
    base, kind = found.get("base_model_name_or_path"), found.get("peft_type")
    if not isinstance(base, str) or not base:
        raise ValueError(f"model: expected base_model_name_or_path in {path}; got {base!r}")
    if not isinstance(kind, str):
        raise ValueError(f"model: expected peft_type in {path}; got {kind!r}")
    if Path(model).is_dir() and not (Path(model) / WEIGHTS).is_file():
        raise ValueError(f"model: expected {WEIGHTS} in {model}, which is not there")
    return Adapter(model, base, found.get("revision"), kind)


def with_adapter(base: PreTrainedModel, adapter: Adapter, trainable: bool = False) -> PeftModel:
    """Put the adapters of a folder on the model they were trained on, with what was trained beside them.

    Args:
        base: changed in place.
        adapter: as `adapter_at` found it.
        trainable: to go on training them; they are frozen otherwise.

    Raises:
        ValueError: files that cannot be read, or weights that are not those of this model's adapters.
    """
    folder = Path(adapter.name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # the error below says so
            model = PeftModel.from_pretrained(base, adapter.name, is_trainable=trainable)
        beside = load_file(folder / BESIDE) if (folder / BESIDE).is_file() else {}
        saved = set(load_file(folder / WEIGHTS)) if folder.is_dir() else None
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"model: expected adapters of {adapter.base} in {adapter.name} ({CONFIG}, {WEIGHTS}); {said}"
        ) from error
    if saved is not None:
        needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        different = sorted(needed - saved) + sorted(name for name in saved - needed if "lora_" in name)
        if different:
            raise ValueError(
                f"model: expected {folder / WEIGHTS} to hold the weights that {CONFIG} describes; "
                f"{different[0]} is in one of them alone"
            )
    own = dict(model.named_parameters())
    for name, tensor in beside.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(
                f"model: expected {folder / BESIDE} to hold weights of {adapter.base}, not {name}"
            )
        own[name].data.copy_(tensor)
        own[name].requires_grad_(trainable)
    return model


def with_adapter_on(base: PreTrainedModel, adapter: Adapter, wanted: Wanted) -> PeftModel:
    """The adapters of a folder, to go on training them. ValueError if they are not what was wanted."""
    if adapter.kind != "LORA":
        raise ValueError(f"model: expected LoRA adapters to train in {adapter.name}, got {adapter.kind}")
    linear = _linear(base)
    model = with_adapter(base, adapter, trainable=True)
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    for name, asked, held in (
        ("lora_rank", wanted.rank or None, config.r),
        ("lora_alpha", wanted.alpha, config.lora_alpha),
        ("lora_dropout", wanted.dropout, config.lora_dropout),
    ):
        if asked is not None and asked != held:
            raise ValueError(
                f"{name}: expected {held:g}, as the adapters in {adapter.name} have it, or nothing, to go on "
                f"with them; got {asked:g} (`opsd merge` makes a model of them, for new ones)"
            )
    adapted = {name for name, one in model.get_base_model().named_modules() if isinstance(one, LoraLayer)}
    if wanted.rank and (adapted != linear or config.rank_pattern):
        raise ValueError(
            f"lora_rank: expected none, since the adapters in {adapter.name} are on {_short(adapted)}, and "
            f"lora_rank {wanted.rank} asks for every linear layer but the head, {_short(linear)}; without it "
            "training goes on with them"
        )
    return model


def merged(model: PeftModel) -> PreTrainedModel:
    """The model below with its adapters added to its weights. ValueError for a kind that cannot be."""
    merge: Callable[[], PreTrainedModel] | None = getattr(model, "merge_and_unload", None)
    if merge is None or model.active_peft_config.is_prompt_learning:
        kind = str(model.active_peft_config.peft_type).removeprefix("PeftType.")
        raise ValueError(f"model: expected adapters that can be merged, got {kind}")
    return merge()


def with_lora(
    model: PreTrainedModel, rank: int, alpha: float | None = None, dropout: float | None = None
) -> PeftModel:
    """Put LoRA adapters on every linear layer but the head, which stays frozen with everything else."""
    if rank < 1:
        raise ValueError(f"lora_rank: expected at least 1, got {rank}")
    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA if alpha is None else alpha,  # type: ignore[arg-type]  # need not be whole
        lora_dropout=DROPOUT if dropout is None else dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def own_adapters(student: PeftModel) -> list[str]:
    """The adapters of a student, without those that a teacher keeps beside them."""
    return [name for name in student.peft_config if not name.startswith(TEACHER)]


@torch.no_grad()
def add_frozen_copy(student: PeftModel) -> str | None:
    """Keep the active adapter as it is now, frozen, as another one, which is off; returns its name.

    None, and nothing is done, unless one LoRA adapter is all that acts on the model.
    """
    layers = [module for module in student.modules() if isinstance(module, ADAPTED)]
    active = {name for layer in layers for name in layer.active_adapters}
    if len(active) != 1 or not all(isinstance(layer, LoraLayer) for layer in layers):
        return None
    (source,) = active
    config = student.peft_config[source]
    if not isinstance(config, LoraConfig) or config.use_dora:
        return None
    name = f"{TEACHER}_{len(student.peft_config)}"
    trained = {parameter: parameter.requires_grad for parameter in student.parameters()}
    plain = copy.copy(config)
    plain.init_lora_weights = True  # some ways to begin change the weights below
    student.add_adapter(name, plain)
    for layer in layers:
        for part in (getattr(layer, held) for held in layer.adapter_layer_names):
            if source in part:
                part[name] = copy.deepcopy(part[source])
        layer.scaling[name] = layer.scaling[source]
    for parameter in student.parameters():
        parameter.requires_grad_(trained.get(parameter, False))
    return name


def _linear(model: PreTrainedModel) -> set[str]:
    """Names of the layers that fresh adapters are put on."""
    head = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def _short(names: set[str]) -> str:
    """The last parts of names, with how many layers they are."""
    parts: dict[str, Any] = dict.fromkeys(name.rpartition(".")[2] for name in sorted(names))
    return f"{len(names)} layers ({', '.join(parts)})"
