"""Pretrain the demo's model: a small Qwen3 that half knows addition, and copies an answer it is shown.

    python -m opsd_train.demo.pretrain

Plain supervised training from random weights, on the completion tokens only. Some prompts carry the answer
in front (the teacher's form), the others do not (the student's form). It stops as soon as the model, asked
without the hint, is right about four times in ten on held-out problems, while with the hint it is nearly
always right: the room between the two is what self-distillation is to close.

Two things that a larger script would have are left out on purpose: no data loader (problems are drawn as they
are needed) and no sampling (one forward pass over the true answers gives both the greedy and the sampled
accuracy). The held-out problems choose when to slow down and when to stop, and nothing else.
"""

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opsd_train.demo.task import STUDENT_TEMPLATE, TEACHER_TEMPLATE, held_out_problems, train_problems

MODEL_DIR = Path(__file__).parent / "model"

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
SYMBOLS = [PAD, END, USER, ASSISTANT, *"0123456789+=;"]
VOCAB_SIZE = 32  # padded beyond the symbols, as the vocabularies of large models are

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('role: expected user or assistant, got ' + message.role) }}"
    "{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Options:
    """What a run is determined by, together with the versions it runs on."""

    seed: int = 0
    threads: int = 1  # the order of sums, and with it the last bits, depends on this
    batch_size: int = 256
    hint_share: float = 0.5  # of the problems in a batch, how many carry the answer
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    max_steps: int = 1_000
    evaluate_every: int = 4
    # Near the end the accuracy rises by more than a point a step. Smaller steps from here on meet the target,
    # and they sharpen the hinted answer, which is the teacher: its certainty bounds the student's.
    settle_from: float = 0.20
    settle_factor: float = 0.1
    target_low: float = 0.38  # greedy held-out accuracy without the hint at which to stop
    target_high: float = 0.42
    target_hint: float = 0.99  # with the hint, at least this


class Accuracy(NamedTuple):
    """Share of problems answered right: by greedy decoding, and expected when sampling at temperature 1."""

    greedy: float
    sampled: float


class Record(NamedTuple):
    """How a run ended: its steps, and the accuracies over a number of held-out problems."""

    steps: int
    problems: int
    plain: Accuracy
    hint: Accuracy


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; a character outside the task's alphabet is an error, not an unknown token."""
    backend = tokenizers.Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """About 0.85 million parameters, with a head_dim (32) that inference engines serve."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def encode(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], template: str
) -> tuple[Tensor, Tensor]:
    """Ids `[B, T]`, padded on the right, and a bool mask `[B, T]` that marks the completion's tokens."""
    chats = [[{"role": "user", "content": template.format(**row)}] for row in rows]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    texts = [prompt + row["solution"] + END for prompt, row in zip(prompts, rows, strict=True)]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    starts = ids == tokenizer.convert_tokens_to_ids(ASSISTANT)
    completion = (starts.cumsum(1) > 0) & ~starts & (ids != tokenizer.pad_token_id)
    return ids, completion


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], template: str
) -> Accuracy:
    """Accuracy on `rows` from one forward pass.

    Greedy decoding gives the answer exactly when each of its tokens is the most likely one after the tokens
    before it; sampling gives it with the product of their probabilities.
    """
    ids, completion = encode(tokenizer, rows, template)
    log_probs = model(ids).logits[:, :-1].float().log_softmax(-1)
    targets, valid = ids[:, 1:], completion[:, 1:]
    hits = (log_probs.argmax(-1) == targets) | ~valid
    chosen = log_probs.gather(-1, targets[..., None])[..., 0] * valid
    return Accuracy(greedy=hits.all(1).float().mean().item(), sampled=chosen.sum(1).exp().mean().item())


def training_loss(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], hinted: int
) -> Tensor:
    """Mean cross-entropy over the completions of `rows`; the first `hinted` come with the answer."""
    loss = torch.zeros(())
    for part, template in ((rows[:hinted], TEACHER_TEMPLATE), (rows[hinted:], STUDENT_TEMPLATE)):
        ids, completion = encode(tokenizer, part, template)
        labels = ids.masked_fill(~completion, -100)
        loss = loss + model(ids, labels=labels).loss * (len(part) / len(rows))
    return loss


def pretrain(
    options: Options, progress: Progress
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast, Record]:
    """Train until the held-out accuracies are where `options` wants them.

    Raises `RuntimeError` where the accuracy without the hint passes its window, or the steps end, before.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    held_out = held_out_problems()
    hinted = round(options.batch_size * options.hint_share)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay
    )
    line = progress.add_task("pretraining", total=None, loss=0.0, plain=0.0, hint=0.0)
    plain = hint = Accuracy(0.0, 0.0)
    settling = False

    for step in range(1, options.max_steps + 1):
        rows = train_problems(options.batch_size, generator)
        loss = training_loss(model, tokenizer, rows, hinted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = options.learning_rate * min(1.0, step / options.warmup_steps)
        optimizer.param_groups[0]["lr"] = rate * (options.settle_factor if settling else 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % options.evaluate_every == 0:
            plain = evaluate(model, tokenizer, held_out, STUDENT_TEMPLATE)
            hint = evaluate(model, tokenizer, held_out, TEACHER_TEMPLATE)
            settling = settling or plain.greedy > options.settle_from
        progress.update(line, completed=step, loss=loss.item(), plain=plain.greedy, hint=hint.greedy)
        in_window = options.target_low <= plain.greedy <= options.target_high
        if in_window and hint.greedy > options.target_hint:
            return model, tokenizer, Record(step, len(held_out), plain, hint)
        if plain.greedy > options.target_high:
            break  # it rises and does not come back
    raise RuntimeError(
        f"stopped at step {step} with greedy held-out accuracy {plain.greedy:.3f} without the hint "
        f"(wanted {options.target_low} to {options.target_high}) and {hint.greedy:.3f} with it "
        f"(wanted above {options.target_hint}); another seed may get there"
    )


def save(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, record: Record, options: Options, out: Path
) -> None:
    """Write the model (fp32 safetensors), the tokenizer and `pretraining.json` into the folder `out`."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        max_new_tokens=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    story = {
        "options": asdict(options),
        "parameters": model.num_parameters(),
        "steps": record.steps,
        "held_out": {
            "problems": record.problems,
            "without_hint": record.plain._asdict(),
            "with_hint": record.hint._asdict(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (out / "pretraining.json").write_text(json.dumps(story, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: `--out` and `--seed`; everything else is in `Options`."""
    parser = argparse.ArgumentParser(description="Pretrain the demo's model.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write the model into")
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument(
        "--threads", type=int, default=Options.threads, help="more is faster, but other last bits"
    )
    arguments = parser.parse_args()
    options = Options(seed=arguments.seed, threads=arguments.threads)
    columns = (
        TextColumn("{task.description} step {task.completed:.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  held-out greedy {task.fields[plain]:.3f}"),
        TextColumn("with hint {task.fields[hint]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        model, tokenizer, record = pretrain(options, progress)
        save(model, tokenizer, record, options, arguments.out)
        progress.console.print(f"{record}\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
