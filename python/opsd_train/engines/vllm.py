"""Rollouts by vLLM in this process: a copy of the model that is sent the student's weights."""

import copy
import importlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from opsd_train.backbone import causal_lm
from opsd_train.config import OPSDConfig
from opsd_train.engines.base import Advance, Completion, Engine, EngineError
from opsd_train.engines.installed import installed
from opsd_train.engines.surroundings import determined, undisturbed
from opsd_train.engines.watchdog import Beat, Watchdog, end_processes
from opsd_train.engines.weights import Named, Sent, tied_head, weight_bytes, weights_of, whole
from opsd_train.rollouts import Sampling, Vocabulary, until_end
from opsd_train.safety import stops
from opsd_train.safety.deadline import OutOfTime
from opsd_train.safety.stops import Stopped
from opsd_train.sharding import gathered

# In this process, so that the weights need not travel; quiet; telling nobody.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
}
TOKENS_PER_STEP_ON_CPU = 2048  # read in some seconds: every step is a sign of life
CLOSES_WITHIN = 30.0  # seconds, whatever a step may take
GIB = 1 << 30


def make(
    config: OPSDConfig,
    student: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
) -> "VLLMEngine":
    """The engine of a configuration."""
    return VLLMEngine(config, student, vocabulary)


class VLLMEngine(Engine):
    """A vLLM of the student's architecture in this process.

    It starts with no weights and gets them by `follow`, through the reload that vLLM's workers offer; nothing
    goes through a disk. Sampling draws from the global random state, which is set from the seed for each call
    and put back: a rollout is a function of the weights, the prompts of its call, the sampling and the seed,
    as far as the kernels compute the same again. A seed for each request is not used; CPU builds of vLLM
    crash on it.

    Args:
        config: the run's: how vLLM is started, its device and the longest prompt and completion.
        student: the model in training.
        vocabulary: its special tokens.

    Raises:
        ValueError: vLLM is not installed, or this model, its adapters or the settings are not for it.
        EngineError: it did not start.
    """

    def __init__(self, config: OPSDConfig, student: torch.nn.Module, vocabulary: Vocabulary) -> None:
        _check_temperature(config.temperature)
        self.config, self.student, self.vocabulary = config, student, vocabulary
        self.version, self.max_length = 0, longest(config, student)
        self.watchdog = Watchdog(config.rollout_stall_seconds)
        self.seconds_to_move = config.patience.moving(weight_bytes(student))
        self.device = config.device
        self.on_gpu = self.device.type != "cpu"
        self.entries = causal_lm(student).config.get_text_config().vocab_size
        # A reload renews one of two layers that share a weight, and CPU builds repack the head's: untie them.
        self._head = None if self.on_gpu else tied_head(causal_lm(student))
        self._broken: str | None = "it has not been given any weights"
        self._asleep = False
        for _ in weights_of(student):  # what cannot be sent is said before anything is started
            pass
        # Shutting vLLM down ends torch's process group, which may be the training's.
        self._owns_group = not torch.distributed.is_initialized()
        before = set(psutil.Process().children(recursive=True))
        with self.watchdog.watching("starting", config.rollout_start_seconds):
            self._llm: Any = self._start()
        self._processes = set(psutil.Process().children(recursive=True)) - before

    def _start(self) -> Any:
        model = causal_lm(self.student)
        described = copy.deepcopy(model.config)
        described.architectures = [type(model).__name__]
        if self._head is not None:
            described.get_text_config().tie_word_embeddings = False
        with tempfile.TemporaryDirectory() as folder, undisturbed(self.device, ENVIRONMENT):
            self._vllm = installed()
            described.save_pretrained(folder)
            try:
                return self._vllm.LLM(model=folder, **self._options())
            except ValueError as error:
                raise ValueError(
                    f"rollouts: expected a model and settings that vLLM can start with; it says: {error}"
                ) from error
            except EngineError:
                raise
            except Exception as error:
                raise EngineError(f"rollouts: vLLM did not start: {type(error).__name__}: {error}") from error

    def _options(self) -> dict[str, Any]:
        config = self.config
        dtype = str(causal_lm(self.student).dtype).removeprefix("torch.")
        options: dict[str, Any] = {
            "load_format": "dummy",  # the weights come with `follow`
            "skip_tokenizer_init": True,  # token ids go in and come out
            "generation_config": "vllm",  # not the model's own defaults
            "trust_remote_code": False,
            "dtype": dtype if config.vllm_dtype == "auto" else config.vllm_dtype,
            "max_model_len": self.max_length,
            "enforce_eager": config.vllm_enforce_eager or not self.on_gpu,
            "seed": config.seed,
            "disable_log_stats": True,
        }
        if config.vllm_kv_cache_gb is not None or not self.on_gpu:
            options["kv_cache_memory_bytes"] = int((config.vllm_kv_cache_gb or 1) * GIB)
        if self.on_gpu:
            options["gpu_memory_utilization"] = config.vllm_gpu_memory_utilization
            options["enable_sleep_mode"] = config.vllm_sleep_level > 0
        else:
            options["max_num_batched_tokens"] = TOKENS_PER_STEP_ON_CPU
        if not self._owns_group:  # each process of the training has an engine of its own
            options["distributed_executor_backend"] = "external_launcher"
        return options

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: Sequence[int]
    ) -> list[Completion]:
        """Complete every prompt; log-probabilities are vLLM's own, before temperature and truncation.

        `sampling.batch_size` has no effect: vLLM batches by the room in its cache.

        Raises:
            Stopped: a signal asked for it, see `stops`.
            OutOfTime: a deadline has passed; what was under way is dropped.
        """
        self._check(prompts, sampling)
        if self._asleep and self.config.vllm_sleep_level == 2:
            self.follow(self.version)
        if self._broken:
            raise EngineError(f"rollouts: vLLM cannot write, {self._broken}")
        self._wake()
        with self._working("writing rollouts") as beat, determined(self.device, seed):
            return self._written(prompts, self._params(sampling), beat)

    def _written(self, prompts: Sequence[Sequence[int]], params: Any, beat: Beat) -> list[Completion]:
        engine = self._llm.llm_engine
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
        found: dict[str, Completion] = {}
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        found[output.request_id] = self._completion(output.outputs[0])
                beat()
                if self.tell is not None:
                    self.tell(Advance(len(found), len(prompts)))
                stops.check()
        except OutOfTime:  # the engine goes on with others
            engine.abort_request([str(index) for index in range(len(prompts)) if str(index) not in found])
            raise
        if len(found) != len(prompts):
            raise EngineError(f"rollouts: expected {len(prompts)} completions of vLLM, got {len(found)}")
        return [found[str(index)] for index in range(len(prompts))]

    def _completion(self, output: Any) -> Completion:
        tokens = until_end(output.token_ids, self.vocabulary.eos_ids)
        outside = [token for token in tokens if not 0 <= token < self.entries]
        if outside or not tokens:
            raise EngineError(
                f"rollouts: expected tokens of the student's {self.entries} entries from vLLM, got "
                f"{outside[0] if outside else 'none at all'}"
            )
        said = zip(tokens, output.logprobs, strict=False)
        logprobs = tuple(float(place[token].logprob) for token, place in said)
        if len(logprobs) != len(tokens) or not all(math.isfinite(value) for value in logprobs):
            raise EngineError("rollouts: expected a finite log-probability of each token from vLLM")
        return Completion(tokens, logprobs, self.version)

    def _params(self, sampling: Sampling) -> Any:
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(self.vocabulary.eos_ids),
            ignore_eos=True,  # only those above end a completion, as with transformers
            logprobs=0,  # of the tokens drawn
            detokenize=False,
            output_kind=importlib.import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY,
        )

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """ValueError for what vLLM would silently do in another way."""
        _check_temperature(sampling.temperature)
        room = self.max_length - sampling.max_tokens
        for prompt in prompts:
            if not 0 < len(prompt) <= room:
                raise ValueError(
                    f"prompts: expected 1 to {room} tokens, since vLLM was started for {self.max_length} and "
                    f"a completion may take {sampling.max_tokens} of them; got {len(prompt)}"
                )

    def follow(self, version: int) -> None:
        """Send every weight; the cache of what the old ones computed goes."""
        self._wake("weights")
        with self._working("taking over weights") as beat:
            self._broken = "its last weights did not all arrive"
            sent = Sent(self._weights(), beat)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": sent})
            if not sent.over:
                raise EngineError(f"rollouts: vLLM stopped taking weights after {sent.count}")
        self._wake()
        with self._working("forgetting what the old weights computed"):
            if not self._llm.reset_prefix_cache():
                raise EngineError("rollouts: vLLM did not forget what the old weights computed")
        self._broken, self.version = None, version

    def _weights(self) -> Iterator[Named]:
        """All weights, the head of its own on a CPU included."""
        yield from weights_of(self.student)
        if self._head is not None:
            head = causal_lm(self.student).get_output_embeddings()
            with gathered(head.parameters()):
                yield self._head, whole(head.weight)

    @property
    def versions(self) -> dict[str, str]:
        """The package in this process."""
        return {"vllm": str(self._vllm.__version__)}

    def rest(self) -> None:
        """Free the GPU's memory as far as `vllm_sleep_level` says; on a CPU there is nothing to free."""
        if self.on_gpu and self.config.vllm_sleep_level > 0 and not self._asleep and not self._broken:
            with self._working("going to sleep", self.seconds_to_move):
                self._llm.sleep(level=self.config.vllm_sleep_level)
                self._asleep = True

    def _wake(self, part: str | None = None) -> None:
        """All of it, or the part that is needed first."""
        if self._asleep:
            with self._working("waking up", self.seconds_to_move):
                self._llm.wake_up(tags=None if part is None else [part])
                self._asleep = part is not None

    @contextmanager
    def _working(self, what: str, seconds: float | None = None) -> Iterator[Beat]:
        """Whatever goes wrong inside is an EngineError, and the engine is not used again.

        Args:
            what: is done.
            seconds: without a sign of life, in place of the watchdog's own.
        """
        if self._llm is None:
            raise EngineError("rollouts: vLLM has been closed")
        try:
            with self.watchdog.watching(what, seconds) as beat:
                yield beat
        except OutOfTime:
            raise
        except BaseException as error:
            self._broken = f"it failed while {what}"
            if isinstance(error, EngineError | Stopped) or not isinstance(error, Exception):
                raise
            raise EngineError(f"rollouts: vLLM died while {what}: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Shut vLLM down and free its memory; in several processes, their process group goes with it."""
        if getattr(self, "_llm", None) is None:
            return
        llm, self._llm = self._llm, None
        try:
            if self._owns_group:
                with self.watchdog.watching("closing", max(self.watchdog.seconds, CLOSES_WITHIN)):
                    llm.llm_engine.engine_core.shutdown()
        finally:
            end_processes([process for process in self._processes if process.is_running()])


def longest(config: OPSDConfig, student: torch.nn.Module) -> int:
    """Tokens of prompt and completion together that the budgets and the model allow."""
    budget = config.max_prompt_length + config.max_completion_length
    positions = getattr(causal_lm(student).config.get_text_config(), "max_position_embeddings", None)
    return budget if positions is None else min(budget, positions)


def _check_temperature(temperature: float) -> None:
    """ValueError for one that vLLM refuses, or replaces by another."""
    if temperature > 2 or 0 < temperature < 0.01:
        raise ValueError(
            f"temperature: expected 0, or 0.01 to 2 for vLLM, got {temperature}; rollouts 'hf' takes any"
        )
