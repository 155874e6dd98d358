"""What a vLLM server is asked before the first rollout: its model, its vocabulary, its settings."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opsd_train.engines.base import EngineError
from opsd_train.engines.client import ServerClient
from opsd_train.engines.exchange import StatusError

GENERATE = "/inference/v1/generate"
COMPARED = 2_000  # tokens of a vocabulary whose texts are compared


@dataclass(frozen=True)
class ServedModel:
    """What a server serves.

    Args:
        name: that requests ask for.
        device: cpu, cuda and so on.
        dtype: of the weights.
        max_length: tokens of prompt and completion.
        max_logprobs: log-probs that a request may ask for at each token; -1 for all.
        version: of vLLM, as the server says.
    """

    name: str
    device: str
    dtype: torch.dtype
    max_length: int
    max_logprobs: int
    version: str


def look_at(client: ServerClient, tokenizer: PreTrainedTokenizerBase, sync: str) -> ServedModel:
    """A server that rollouts can come from.

    Raises:
        ValueError: it serves another model, another vocabulary, or was started without what is needed.
        EngineError: it does not answer.
    """
    served, config = read_server(client)
    check_vocabulary(client, tokenizer, "vllm_url")
    if config["model_config"]["logprobs_mode"] != "raw_logprobs":
        raise ValueError(
            f"vllm_url: expected a server with --logprobs-mode raw_logprobs at {client.url}, got "
            f"{config['model_config']['logprobs_mode']}"
        )
    if sync == "nccl":
        backend = (config.get("weight_transfer_config") or {}).get("backend")
        if backend != "nccl" or served.device != "cuda" or not torch.cuda.is_available():
            raise ValueError(
                "vllm_sync: expected GPUs on both sides and a server with --weight-transfer-config "
                f"'{{\"backend\":\"nccl\"}}' for 'nccl'; got a server on {served.device} with {backend}, and "
                f"{'a' if torch.cuda.is_available() else 'no'} GPU here; use vllm_sync 'disk'"
            )
    if sync == "lora" and not config.get("lora_config"):
        raise ValueError(
            f"vllm_sync: expected a server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 at "
            f"{client.url} for 'lora'"
        )
    return served


def read_server(client: ServerClient) -> tuple[ServedModel, dict[str, Any]]:
    """What a server serves, and its configuration; ValueError if a route that is needed is not there."""
    base = _base_model(client)
    try:
        # The first time, the server looks at all of its environment.
        config = client.get_slowly("/server_info?config_format=json")["vllm_config"]
    except StatusError as error:
        raise ValueError(
            f"vllm_url: expected a server that was started with VLLM_SERVER_DEV_MODE=1 at {client.url}, on a "
            f"network of its own; {error}"
        ) from None
    model = config["model_config"]
    try:
        client.post(GENERATE, {"token_ids": [0], "sampling_params": {"max_tokens": 1}})
    except StatusError as error:
        raise ValueError(
            f"vllm_url: expected a server that was started with --enable-scale-out at {client.url}; {error}"
        ) from None
    dtype = getattr(torch, str(model["dtype"]).removeprefix("torch."))
    device = str(config["device_config"]["device"]).partition(":")[0]
    version = str(client.get("/version")["version"])
    lengths = base["max_model_len"], model["max_logprobs"]
    return ServedModel(base["id"], device, dtype, *lengths, version), config


def served_name(client: ServerClient) -> str:
    """What requests ask for."""
    return str(_base_model(client)["id"])


def _base_model(client: ServerClient) -> dict[str, Any]:
    """What the server says of its model, not of adapters of it."""
    models = client.get("/v1/models")["data"]
    return next((model for model in models if not model.get("parent")), models[0])


def keeps_own_head(client: ServerClient, served: ServedModel, size: int) -> bool:
    """Whether a server of so many bytes of weights keeps a tied head apart from the embedding.

    ValueError for one on a CPU that does not: vLLM repacks the head there when it starts, and never again.
    """
    names = client.post("/weight_checker", {"action": "checksum"}, size)["checksums"]
    found = any(name.endswith("lm_head.weight") for name in names)
    if served.device == "cpu" and not found:
        raise ValueError(
            "vllm_url: expected a server that keeps a tied head apart, as vLLM on a CPU never updates one: "
            "ask for vllm_start, or start it from a checkpoint with a lm_head.weight of its own and "
            f"tie_word_embeddings false; {client.url} has a tied one"
        )
    return found


def check_vocabulary(client: ServerClient, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """ValueError unless the server writes the same text for token ids as the tokenizer does."""
    count = len(tokenizer)
    ids = sorted({*range(0, count, max(1, count // COMPARED)), *tokenizer.all_special_ids, count - 1})
    theirs = client.post("/detokenize", {"tokens": ids})["prompt"]
    ours = tokenizer.decode(ids)
    if theirs != ours:
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(ours))
        raise ValueError(
            f"{name}: expected the student's vocabulary at {client.url}; of {len(ids)} tokens it writes "
            f"{theirs[at : at + 30]!r} where the student's tokenizer writes {ours[at : at + 30]!r}"
        )


def check_sampled(logprob: float) -> float:
    """A log-prob of a token that was drawn; EngineError if it is none."""
    if not (math.isfinite(logprob) and logprob <= 1e-3):
        raise EngineError(f"vLLM server: expected the log-prob of a token that was drawn, got {logprob}")
    return logprob
