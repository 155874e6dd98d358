"""Which model is trained on which data."""

from dataclasses import dataclass, field

from opsd_train.method_config import option


@dataclass
class RunOptions:
    """Which model is trained on which data; how, `OPSDConfig` says."""

    model: str = field(metadata={"help": "Local folder or hub id of a causal language model."})
    data: str = field(metadata={"help": "Training rows, a .jsonl or .parquet file."})
    eval_data: str | None = option(None, "Held-out rows with an `answer` or a `solution`.")
    gguf_file: str | None = option(None, "Load this GGUF file of the model's folder.")
    revision: str | None = option(None, "Commit, tag or branch of a hub id.")
    dtype: str = option("float32", "Dtype of the weights: float32, bfloat16 or float16.")
    lora_rank: int = option(
        0, "Rank of LoRA adapters on all linear layers but the head; 0 trains every weight."
    )
    lora_alpha: float = option(32.0, "LoRA's alpha: updates scale with alpha / rank.")
    lora_dropout: float = option(0.0, "Dropout in front of the LoRA adapters.")
