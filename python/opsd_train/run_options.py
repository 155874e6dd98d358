"""Which model is trained on which data."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opsd_train.data.generated import HELD_OUT_SEED
from opsd_train.data.quarantine import Refuse, stop
from opsd_train.data.rows import Reading
from opsd_train.data.sources import Choice
from opsd_train.fields import check_finite, json_object, option

if TYPE_CHECKING:
    from opsd_train.adapters import Wanted
    from opsd_train.loading import Source


@dataclass
class RunOptions:
    """Which model is trained on which data; how, `OPSDConfig` says."""

    model: str = field(metadata={"help": "Local folder or hub id of a causal language model."})
    data: str = field(
        metadata={
            "help": "Training rows: a .jsonl, .json, .parquet or .csv file, a glob, a folder, a hub id (name "
            "or name:configuration), or reasoning_gym:TASK; ?split=... behind it beats the options below."
        }
    )
    eval_data: str | None = option(None, "Held-out rows with an `answer` or a `solution`, named like `data`.")
    data_split: str = option("train", "Split of a folder or a hub id in `data`.")
    eval_split: str = option("test", "Split of a folder or a hub id in `eval_data`.")
    data_revision: str | None = option(None, "Commit, tag or branch of a hub id in `data` and `eval_data`.")
    task_size: int = option(500, "Problems to generate for reasoning_gym:TASK.")
    task_seed: int = option(0, "Problem i of reasoning_gym:TASK is drawn with the seed task_seed + i.")
    eval_size: int = option(128, "Held-out problems to generate for reasoning_gym:TASK.")
    columns: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON with the data set's names of columns by ours, say "
            '{"problem": "question", "solution": "answer"}.'
        },
    )
    skip_bad_rows: int = option(
        0, "Set aside up to so many bad rows in bad_rows.jsonl of the run folder; one more stops the run."
    )
    repeated_rows: str = option(
        "keep", "Whether a row that comes again is kept (`keep`) or a bad one (`refuse`)."
    )
    gguf_file: str | None = option(None, "Load this GGUF file of the model's folder.")
    revision: str | None = option(None, "Commit, tag or branch of a hub id.")
    dtype: str = option("float32", "Dtype of the weights: float32, bfloat16 or float16.")
    attn_implementation: str | None = option(
        None, "How attention is computed, a name of transformers: eager, sdpa, flash_attention_2 or others."
    )
    load_in_4bit: bool = option(
        False, "Quantise the frozen weights to NF4, for lora_rank; needs bitsandbytes and a GPU."
    )
    load_in_8bit: bool = option(
        False, "Quantise the frozen weights to 8 bits, for lora_rank; needs bitsandbytes and a GPU."
    )
    lora_rank: int = option(
        0,
        "Rank of LoRA adapters on all linear layers but the head; 0 trains every weight. A `model` that is a "
        "folder of adapters goes on with these, at 0 or at their own rank.",
    )
    lora_alpha: float | None = option(
        None, "LoRA's alpha: updates scale with alpha / rank. None is 32, or what adapters in `model` have."
    )
    lora_dropout: float | None = option(
        None, "Dropout in front of the LoRA adapters. None is 0, or what adapters in `model` have."
    )

    def __post_init__(self) -> None:
        check_finite(self)
        self.columns = json_object("columns", self.columns or {})
        for ours, theirs in self.columns.items():
            if not isinstance(theirs, str):
                raise ValueError(f"columns: expected the name of a column for {ours!r}, got {theirs!r}")
        if self.repeated_rows not in ("keep", "refuse"):
            raise ValueError(f"repeated_rows: expected keep or refuse, got {self.repeated_rows!r}")
        if self.skip_bad_rows < 0:
            raise ValueError(f"skip_bad_rows: expected a number of at least 0, got {self.skip_bad_rows}")
        if self.load_in_4bit and (self.load_in_8bit or self.gguf_file):
            raise ValueError("load_in_4bit: expected neither load_in_8bit nor gguf_file with it; got one")
        if self.load_in_8bit and self.gguf_file:
            raise ValueError("load_in_8bit: expected no gguf_file with it; got one")

    def source(self) -> "Source":
        """The model, and how it is loaded."""
        from opsd_train.loading import Source  # and with it all that loads: not for a mistake in an option

        bits = 4 * self.load_in_4bit + 8 * self.load_in_8bit
        return Source(self.model, self.dtype, self.gguf_file, self.revision, self.attn_implementation, bits)

    def lora(self) -> "Wanted":
        """The adapters that are trained."""
        from opsd_train.adapters import Wanted

        return Wanted(self.lora_rank, self.lora_alpha, self.lora_dropout)

    def choice(self, held_out: bool = False) -> Choice:
        """Which part of `data`, or of `eval_data`, is read."""
        if held_out:
            return Choice(self.eval_split, self.data_revision, self.eval_size, HELD_OUT_SEED)
        return Choice(self.data_split, self.data_revision, self.task_size, self.task_seed)

    def reading(self, refuse: Refuse = stop, held_out: bool = False) -> Reading:
        """How `data`, or `eval_data`, is read."""
        repeats = self.repeated_rows == "keep"
        return Reading(self.choice(held_out), dict(self.columns or {}), refuse, repeats)  # type: ignore[arg-type]
