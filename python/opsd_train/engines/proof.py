"""Whether a vLLM server has the trainer's weights: by checksums of tensors, and by what it says of tokens."""

import hashlib
import time

import torch

from opsd_train.backbone import causal_lm
from opsd_train.engines.base import EngineError
from opsd_train.engines.client import ServerClient
from opsd_train.engines.handshake import GENERATE, ServedModel
from opsd_train.engines.sync import LoraSync, Sync
from opsd_train.rollouts import evaluating

ALARM = 0.1  # mean absolute difference of log-probs
PROBE = 16  # tokens of the probe


class Proof:
    """Checks a server after each transfer.

    Args:
        client: the server.
        served: what it serves.
        checksums: whether tensors are compared bit by bit. vLLM fuses and repacks most weights; compared are
            those that it had under the trainer's names, with equal bits, after the first transfer (norms,
            embeddings, projections that are not fused), and at least one of them.
    """

    def __init__(self, client: ServerClient, served: ServedModel, checksums: bool = True) -> None:
        self.client, self.served, self.checksums = client, served, checksums
        self.compared: frozenset[str] | None = None  # as the server names them
        self.names: frozenset[str] = frozenset()  # as the trainer does
        self.difference = 0.0

    def await_tag(self, tag: str, seconds: float) -> None:
        """Wait until the server calls its weights so; EngineError after so many seconds."""
        end = time.monotonic() + seconds
        while (found := self.client.get("/weight_info")["weight_version"]) != tag:
            if time.monotonic() > end:
                raise EngineError(
                    f"vLLM server at {self.client.url}: expected weights {tag!r}, got {found!r}"
                )
            time.sleep(0.2)

    def check(self, sync: Sync, tag: str) -> None:
        """EngineError unless the server has the student's weights under this tag."""
        self.await_tag(tag, 0)
        if self.checksums and not isinstance(sync, LoraSync):
            self._compare_bits(sync)
        self.difference = self._probe(sync, tag)
        if not self.difference <= ALARM:
            raise EngineError(
                f"vLLM server at {self.client.url}: expected the trainer's log-probs to within {ALARM} after "
                f"sending it weights {tag!r}; they differ by {self.difference:.3g} on average over {PROBE} "
                "tokens: it serves another model, or did not get all weights"
            )

    def _compare_bits(self, sync: Sync) -> None:
        ours = {
            name: _digest(tensor.to(self.served.dtype))
            for name, tensor in sync.weights()  # on every rank, since sharded weights are gathered
            if sync.is_main and (self.compared is None or name in self.names)
        }
        if not sync.is_main:
            return
        found = self.client.post("/weight_checker", {"action": "checksum"}, sync.size)["checksums"]
        # A server with adapters has its own weights one level deeper.
        theirs = {key: key.rpartition(":")[2].replace(".base_layer.", ".") for key in found}
        equal = frozenset(key for key, name in theirs.items() if ours.get(name) == found[key])
        if self.compared is None:
            self.compared = equal
            self.names = frozenset(theirs[key] for key in equal)
            if not equal:
                raise EngineError(
                    f"vLLM server at {self.client.url}: none of its {len(found)} tensors has the bits of the "
                    "trainer's after a transfer; if it quantises all of them, set vllm_checksums to false"
                )
        missing = sorted(self.compared - equal)
        if missing:
            raise EngineError(
                f"vLLM server at {self.client.url}: {len(missing)} of {len(self.compared)} tensors do not "
                f"have the trainer's bits after a transfer, {missing[0]!r} among them: it was not complete"
            )

    @torch.no_grad()
    def _probe(self, sync: Sync, tag: str) -> float:
        """Mean absolute difference of log-probs over tokens that the server writes greedily."""
        model = causal_lm(sync.student)
        size = model.config.get_text_config().vocab_size
        length = min(PROBE, self.served.max_length // 4)
        prompt = torch.linspace(0, size - 1, length).long().tolist()
        settings = {
            "temperature": 0.0,
            "max_tokens": length,
            "logprobs": 0,
            "ignore_eos": True,
            "detokenize": False,
        }
        body = {"model": sync.model(self.served.name, tag), "token_ids": prompt, "sampling_params": settings}
        choice = self.client.post(GENERATE, body)["choices"][0]
        written = torch.tensor(choice["token_ids"])
        theirs = torch.tensor([one["logprob"] for one in choice["logprobs"]["content"]])
        ids = torch.cat([torch.tensor(prompt), written])[None].to(model.device)
        with evaluating(sync.student):
            logits = model(input_ids=ids, use_cache=False).logits[0, length - 1 : -1].float()
        ours = logits.log_softmax(-1).cpu().gather(-1, written[:, None])[:, 0]
        return (ours - theirs).abs().mean().item()


def _digest(tensor: torch.Tensor) -> str:
    """As the server computes it."""
    return hashlib.sha256(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
