"""Rollouts by a vLLM server that runs beside the trainer, or on other machines."""

import secrets
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from opsd_train.backbone import causal_lm
from opsd_train.config import OPSDConfig
from opsd_train.engines.base import Advance, Completion, Engine, EngineError
from opsd_train.engines.client import ServerClient
from opsd_train.engines.handshake import GENERATE, ServedModel, check_sampled, keeps_own_head, look_at
from opsd_train.engines.launch import ChildServer, Launch
from opsd_train.engines.nccl import NcclSync
from opsd_train.engines.place import FOLDER, place_of
from opsd_train.engines.proof import Proof
from opsd_train.engines.sync import DiskSync, LoraSync, Sync, is_tied, write_checkpoint
from opsd_train.rollouts import Sampling, Vocabulary
from opsd_train.run_folder import SERVER_LOG

STREAMED = 16  # tokens in an event: so many may be written without a sign of life


class ServerEngine(Engine):
    """A stock vLLM server; every call ends in time, and every rollout says which weights wrote it.

    Rollouts come from `/inference/v1/generate`: token ids in, token ids out with their log-probs, and the
    version of the weights at each token. The server's generation defaults have no say in it.

    Args:
        client: the server, healthy.
        served: what it serves, see `look_at`.
        sync: how it gets the student's weights.
        vocabulary: the special tokens of the student.
        settings: see `Settings`.
    """

    def __init__(
        self,
        client: ServerClient,
        served: ServedModel,
        sync: Sync,
        vocabulary: Vocabulary,
        settings: "Settings",
    ) -> None:
        self.client, self.served, self.sync, self.vocabulary = client, served, sync, vocabulary
        self.settings = settings
        self.proof = Proof(client, served, settings.checksums)
        self.version, self.tag = -1, ""
        self.child: ChildServer | None = None
        self.started = ExitStack()  # ends what the run started

    def follow(self, version: int) -> None:
        """Send the weights, and check that they are the trainer's: by checksums and by log-probs."""
        self.tag = f"{self.settings.run}-{version}"
        self.sync.send(self.tag)
        if not self.sync.is_main:
            # The first rank writes the weights, has them read, and finds out itself if it waits for nothing.
            patience = self.client.patience
            self.proof.await_tag(self.tag, 2 * patience.moving(self.sync.size) + 2 * patience.stall)
        self.proof.check(self.sync, self.tag)
        self.version = version

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: Sequence[int]
    ) -> list[Completion]:
        """Complete every prompt; the server is told seeds unless it runs on a CPU, where vLLM has none."""
        if not prompts:
            return []
        base = self._parameters(sampling)
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts), np.uint32).tolist()
        seeded = self.served.device != "cpu"
        bodies = [
            {
                "model": self.sync.model(self.served.name, self.tag),
                "token_ids": list(prompt),
                "sampling_params": base | ({"seed": own} if seeded else {}),
                "stream": True,
            }
            for prompt, own in zip(prompts, seeds, strict=True)
        ]
        tell = self.tell or (lambda advance: None)
        streams = self.client.stream_all(
            GENERATE, bodies, self.settings.concurrency, lambda done: tell(Advance(done, len(bodies)))
        )
        return [self._completion(events, sampling.max_tokens) for events in streams]

    def close(self) -> None:
        """End the transfer, and the server if the run started it."""
        self.sync.close()
        self.started.close()
        self.child = None

    @property
    def versions(self) -> dict[str, str]:
        """vLLM's, as the server says."""
        return {"vllm": self.served.version}

    def _parameters(self, sampling: Sampling) -> dict[str, Any]:
        """vLLM's sampling parameters; whatever else it has keeps the value that does nothing."""
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_tokens,
            "logprobs": 0,
            "ignore_eos": True,  # the ends are those of the run, not of the model's defaults
            "stop_token_ids": list(self.vocabulary.eos_ids),
            "detokenize": False,
            "stream_interval": STREAMED,
        }

    def _completion(self, events: Sequence[Any], most: int) -> Completion:
        """The tokens of a stream; EngineError if they are not what was asked for."""
        tokens: list[int] = []
        logprobs: list[float] = []
        reason = versions = None
        for event in events:
            for choice in event["choices"]:
                tokens += choice["token_ids"] or []
                said = (choice["logprobs"] or {}).get("content") or []
                logprobs += [check_sampled(one["logprob"]) for one in said]
                reason = choice["finish_reason"] or reason
                versions = choice["weight_versions"] or versions
        if not all(0 <= token < self.settings.vocabulary_size for token in tokens):
            raise EngineError(
                f"vLLM server at {self.client.url}: expected tokens below {self.settings.vocabulary_size}, "
                f"the student's vocabulary; got {max(tokens)}"
            )
        ends = self.vocabulary.eos_ids
        whole = bool(tokens) and not any(token in ends for token in tokens[:-1])
        ended = tokens[-1] in ends if reason == "stop" and tokens else len(tokens) == most
        if not whole or not ended or len(logprobs) != len(tokens) or reason not in ("stop", "length"):
            raise EngineError(
                f"vLLM server at {self.client.url}: expected a rollout up to its first end-of-sequence or of "
                f"{most} tokens, with as many log-probs; got {len(tokens)} tokens, {len(logprobs)} "
                f"log-probs, finish_reason {reason!r}"
            )
        wrote = {span["version"] for span in versions or []}
        if wrote != {self.tag}:
            raise EngineError(
                f"vLLM server at {self.client.url}: expected rollouts of weights {self.tag!r}, got "
                f"{', '.join(sorted(wrote)) or 'none'}; it was restarted, or another run sends to it"
            )
        return Completion(tuple(tokens), tuple(logprobs), self.version)


@dataclass(frozen=True)
class Settings:
    """What a `ServerEngine` is told.

    Args:
        run: what its versions begin with on the server.
        vocabulary_size: tokens that the student has.
        concurrency: requests at once.
        checksums: whether weights are compared bit by bit after each transfer.
    """

    run: str
    vocabulary_size: int
    concurrency: int = 256
    checksums: bool = True


def make(
    config: OPSDConfig,
    student: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
) -> ServerEngine:
    """The engine of a configuration, with its server started if that is asked for.

    Raises:
        ValueError: what is asked for cannot be done with this student or this server.
        EngineError: the server is not there.
    """
    is_main = config.process_index == 0
    client = ServerClient(config.vllm_url, config.patience, config.server_arguments.api_key)
    run = _name()
    shared = Path(config.vllm_sync_dir or Path(config.output_dir or ".") / FOLDER)
    with ExitStack() as started:
        folder = started.enter_context(place_of(run, shared)) if is_main else shared / run
        sync = _make_sync(config, client, student, folder, is_main)
        child = _start(config, client, student, tokenizer, folder, is_main) if config.vllm_start else None
        if child is not None:
            started.callback(child.close)
            child.wait(client, config.rollout_start_seconds)
        elif config.vllm_start:
            client.wait(config.rollout_start_seconds)
        elif (ill := client.healthy(client.patience.answer)) is not None:
            by_hand = _launch(config, student, str(causal_lm(student).name_or_path))
            raise EngineError(f"vllm_url: {ill}; start a server with\n{by_hand}\nor ask for vllm_start")
        served = look_at(client, tokenizer, config.vllm_sync)
        if config.vllm_sync != "lora" and is_tied(student):
            sync.own_head = keeps_own_head(client, served, sync.size)
        size = causal_lm(student).get_output_embeddings().weight.shape[0]
        settings = Settings(run, size, config.vllm_concurrency, config.vllm_checksums)
        engine = ServerEngine(client, served, sync, vocabulary, settings)
        engine.child, engine.started = child, started.pop_all()
    return engine


def _name() -> str:
    """What the versions of this run's weights begin with on a server: of no other run, and of every rank."""
    drawn = torch.tensor([secrets.randbits(63)], device=PartialState().device)
    return f"{int(broadcast(drawn)):016x}"


def _start(
    config: OPSDConfig,
    client: ServerClient,
    student: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    is_main: bool,
) -> ChildServer | None:
    """A server of the student as it is; None on other ranks than the first."""
    if is_main and client.healthy(2.0) is None:
        raise ValueError(f"vllm_url: expected nothing at {client.url} for vllm_start, but a server is there")
    model = str(causal_lm(student).name_or_path)
    if config.vllm_sync != "lora":
        write_checkpoint(student, tokenizer, folder / "start", is_main)
        model = str(folder / "start")
    return ChildServer(_launch(config, student, model)) if is_main else None


def _make_sync(
    config: OPSDConfig, client: ServerClient, student: torch.nn.Module, folder: Path, is_main: bool
) -> Sync:
    if config.vllm_sync == "lora":
        return LoraSync(client, student, folder, is_main)
    if config.vllm_sync == "nccl":
        host, _, port = config.vllm_master.rpartition(":")
        return NcclSync(client, student, (host, int(port)), is_main)
    return DiskSync(client, student, folder, is_main)


def _launch(config: OPSDConfig, student: torch.nn.Module, model: str) -> Launch:
    """How a server of this student is started."""
    adapters = student.peft_config[student.active_adapter] if isinstance(student, PeftModel) else None
    rank = adapters.r if isinstance(adapters, LoraConfig) else 0
    return Launch(
        url=config.vllm_url,
        model=model,
        sync=config.vllm_sync,
        arguments=config.server_arguments,
        python=config.vllm_python or sys.executable,
        log=Path(config.output_dir or ".") / SERVER_LOG,
        rank=rank,
    )
