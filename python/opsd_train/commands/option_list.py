"""What `opsd options` shows: every option by what it concerns, with its default and its meaning."""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from opsd_train.config import OPSDConfig
from opsd_train.inherited import UNUSED
from opsd_train.json_files import dumps
from opsd_train.run_options import RunOptions

# A name that ends in _ stands for all that begin so. The first group that has an option shows it.
GROUPS = {
    "Model": "model revision gguf_file dtype attn_implementation load_in_4bit load_in_8bit lora_",
    "Data": "data eval_data data_split data_revision eval_split task_ eval_size columns skip_bad_rows "
    "repeated_rows",
    "Rollouts": "rollouts rollout_ num_generations generation_batch_size max_completion_length temperature "
    "top_p top_k horizon turns offline",
    "Prompts": "max_prompt_length max_teacher_prompt_length student_ context_ contexts teacher_template "
    "teacher_chat_kwargs teacher_thinking pool annotator exposure",
    "Teacher": "teacher teacher_ ema_",
    "Loss": "objective beta entry_clip clip_mode token_clip loss_temperature method method_ length_gate",
    "Training": "max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps "
    "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm optim gradient_checkpointing "
    "bf16 seed use_cpu fsdp deepspeed max_bad_steps private subnetwork subnetwork_share extrapolate",
    "Evaluation": "eval_strategy eval_steps eval_match verifier eval_samples eval_k eval_seconds "
    "per_device_eval_batch_size",
    "Saving and logging": "output_dir resume_from_checkpoint save_strategy save_steps save_total_limit "
    "logging_ report_to run_name mass_top_k rollouts_recorded save_completions_every",
    "vLLM": "vllm_",
}
REST = "Other options of transformers.TrainingArguments"
WITHOUT_EFFECT = {"remove_unused_columns", "disable_tqdm", *UNUSED}


def grouped(everything: bool = False) -> dict[str, list[Field[Any]]]:
    """The options by group; what is inherited and in no group comes last, if everything is wanted."""
    found: dict[str, list[Field[Any]]] = {name: [] for name in (*GROUPS, REST)}
    for field in (*fields(RunOptions), *fields(OPSDConfig)):
        if field.name not in WITHOUT_EFFECT:
            found[group_of(field.name)].append(field)
    for name, words in GROUPS.items():
        order = words.split()
        found[name].sort(key=lambda field: order.index(_word_of(field.name, order) or ""))
    if not everything:
        del found[REST]
    return found


def group_of(name: str) -> str:
    """The group that shows an option."""
    return next((group for group, words in GROUPS.items() if _word_of(name, words.split())), REST)


def listed(everything: bool = False, word: str | None = None) -> Group:
    """The options, or those with a word in their name or meaning. ValueError if there is none."""
    wanted = word is None
    shown: list[Any] = []
    for group, members in grouped(everything or not wanted).items():
        kept = [field for field in members if wanted or _has(field, str(word), group)]
        if kept:
            shown += [Text(group, style="bold"), *(part for field in kept for part in _lines(field)), Text()]
    if not shown:
        raise ValueError(f"options: expected a word of an option's name or meaning; got {word!r}")
    return Group(*shown[:-1])


def _word_of(name: str, words: list[str]) -> str | None:
    """The word that stands for a name: itself, or a beginning of it."""
    if name in words:
        return name
    return next((word for word in words if word.endswith("_") and name.startswith(word)), None)


def _has(field: Field[Any], word: str, group: str) -> bool:
    """Whether a word is in the name, or in the meaning of an option that is no other package's alone."""
    plain = word.lower().lstrip("-").replace("-", "_")
    return plain in field.name or (group != REST and word.lower() in _meaning(field).lower())


def _lines(field: Field[Any]) -> Iterator[Any]:
    name = Text(f"--{field.name.replace('_', '-')}", style="cyan")
    yield Padding(name.append(f" {_default(field)}".rstrip(), style="default"), (0, 0, 0, 2), expand=False)
    if meaning := _meaning(field):
        yield Padding(Text(meaning), (0, 0, 0, 6), expand=False)


def _meaning(field: Field[Any]) -> str:
    return " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())


def _default(field: Field[Any]) -> str:
    """As it would be written; nothing where there is none."""
    if field.default is MISSING:
        return "(required)" if field.default_factory is MISSING else ""
    value = getattr(field.default, "value", field.default)
    if value is None:
        return ""
    if isinstance(value, str) and value and not any(letter.isspace() for letter in value):
        return value
    return " ".join(dumps(value).split()) if isinstance(value, bool | str | dict | list) else str(value)
