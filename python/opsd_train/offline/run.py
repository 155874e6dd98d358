"""The cache that the command line asks for."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from opsd_train.backbone import check_head, check_positions
from opsd_train.demo import task
from opsd_train.loading import load
from opsd_train.offline.cache import Cache
from opsd_train.offline.collect import CacheOptions, Writer
from opsd_train.rollouts import Sampling, Vocabulary
from opsd_train.run_folder import check_folder
from opsd_train.studies.given import Given, config_of, load_given
from opsd_train.teachers.weights import Teacher

DEMO_ROWS = 1_024


@dataclass(frozen=True)
class Request:
    """What to cache.

    Args:
        demo: the demo's model and 1,024 of its training problems, instead of `--model` and `--data`.
        teacher_model: folder or hub id of another teacher; None for the student with the teacher's context.
        samples: see `CacheOptions`, as the next two.
        top_k: of the teacher, not of the sampling.
        shard_size: rollouts in a file.
        arguments: options (`--name=value`) of RunOptions and OPSDConfig.
    """

    demo: bool
    teacher_model: str | None
    samples: int
    top_k: int
    shard_size: int
    arguments: tuple[str, ...]


def make(request: Request, folder: Path, console: Console) -> Cache:
    """Write the cache, or what is missing of it. Raises ValueError for what is wrong with the request."""
    check_folder(folder)
    config = config_of(request.demo, request.arguments)
    options = CacheOptions(
        sampling=Sampling(
            config.temperature,
            config.top_p,
            config.top_k,
            config.max_completion_length,
            config.generation_batch_size or config.per_device_eval_batch_size,
        ),
        samples=request.samples,
        top_k=request.top_k,
        temperature=config.loss_temperature,
        shard_size=request.shard_size,
        seed=config.seed,
    )
    with console.status("loading"):
        drawn = task.train_problems(DEMO_ROWS, torch.Generator().manual_seed(config.seed))
        given = load_given(request.arguments, drawn if request.demo else None)
        teacher = _teacher(request, given, config.device)
    prompts = given.prompts(config)
    for model in (given.model, teacher):
        check_positions(model, prompts, config.max_completion_length)
        check_head(model, prompts[0].student_ids)
    vocabulary = Vocabulary.of(given.model, given.tokenizer)
    about = {"model": given.name, "teacher": request.teacher_model or given.name}
    with console.status("writing") as status:
        Writer(given.model, Teacher(teacher), vocabulary, options, about).write(
            folder, prompts, lambda done, total: status.update(f"shard {done:,} of {total:,}")
        )
    return Cache(folder)


def _teacher(request: Request, given: Given, device: torch.device) -> torch.nn.Module:
    if request.teacher_model is None:
        return given.model
    model, tokenizer = load(request.teacher_model)
    _check_vocabulary(given.tokenizer, tokenizer)
    return model.to(device).requires_grad_(False)  # type: ignore[arg-type]


def _check_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token has the same id in both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = [token for token in ours | theirs if ours.get(token) != theirs.get(token)]
    if different:
        raise ValueError(
            f"teacher_model: expected the student's vocabulary; {len(different):,} tokens differ, for one "
            f"{different[0]!r}"
        )
