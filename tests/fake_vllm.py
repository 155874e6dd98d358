"""A package `vllm` for tests: the same interface, a model that counts, and everything that can go wrong."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

LOGPROB = -0.5


class SamplingParams:
    """Keeps what it is given."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)


@dataclass
class Behaviour:
    """What the fake does instead of working; `calls` is what it was asked, in order."""

    at_start: Callable[[], None] | None = None
    at_step: Callable[[], None] | None = None
    takes: int | None = None  # weights, then it stops reading
    at_weights: Callable[[], None] | None = None
    token: int = 5
    forgets: bool = True
    calls: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


class LLMEngine:
    """Writes `token` until a step before the last, then the first stop token."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour, self.waiting = behaviour, []
        self.engine_core = SimpleNamespace(shutdown=lambda: behaviour.calls.append("shutdown"))

    def add_request(self, number: str, prompt: dict[str, list[int]], params: SamplingParams) -> None:
        self.waiting.append((number, prompt["prompt_token_ids"], params))

    def abort_request(self, numbers: list[str]) -> None:
        self.waiting = [one for one in self.waiting if one[0] not in numbers]

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        if self.behaviour.at_step is not None:
            self.behaviour.at_step()
        number, prompt, params = self.waiting.pop()  # the last one is ready first
        self.behaviour.calls.append(("write", prompt, params))
        tokens = [self.behaviour.token] * (params.max_tokens - 1) + [params.stop_token_ids[0]]
        said = [{token: SimpleNamespace(logprob=LOGPROB)} for token in tokens]
        output = SimpleNamespace(token_ids=tokens, logprobs=said)
        return [SimpleNamespace(request_id=number, finished=True, outputs=[output])]


def fake_vllm(behaviour: Behaviour, version: str = "0.32.0") -> dict[str, ModuleType]:
    """Modules by name, for `sys.modules`."""

    class LLM:
        def __init__(self, **options: Any) -> None:
            behaviour.options.update(options)
            if behaviour.at_start is not None:
                behaviour.at_start()
            self.llm_engine = LLMEngine(behaviour)

        def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
            behaviour.calls.append(method)
            weights: Iterator[tuple[str, torch.Tensor]] = iter(kwargs["weights_iterator"])
            for count, (name, tensor) in enumerate(weights):
                behaviour.weights[name] = tensor.clone()
                if behaviour.at_weights is not None:
                    behaviour.at_weights()
                if count + 1 == behaviour.takes:
                    break

        def reset_prefix_cache(self) -> bool:
            behaviour.calls.append("reset")
            return behaviour.forgets

        def sleep(self, level: int) -> None:
            behaviour.calls.append(f"sleep {level}")

        def wake_up(self, tags: list[str] | None = None) -> None:
            behaviour.calls.append(f"wake {tags}")

    package, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    package.__version__ = version  # type: ignore[attr-defined]
    package.LLM, package.LLMEngine, package.SamplingParams = LLM, LLMEngine, SamplingParams  # type: ignore[attr-defined]
    params.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")  # type: ignore[attr-defined]
    return {"vllm": package, "vllm.sampling_params": params}


def hang() -> None:
    """Without end."""
    time.sleep(600)


def die() -> None:
    """As an engine does when a kernel fails."""
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
