"""A teacher behind a vLLM server, which says how likely the student's own most likely tokens are.

What a server sends for a token is a few log-probs of its whole softmax, so the loss is exact on these entries
and on the mass of the rest, and knows nothing of how the teacher divides that rest.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_kernels import Hidden, LogLinear, TopK
from opsd_train.backbone import logits
from opsd_train.engines.base import EngineError
from opsd_train.engines.client import ServerClient
from opsd_train.engines.exchange import StatusError
from opsd_train.engines.handshake import GENERATE, check_vocabulary, served_name
from opsd_train.engines.patience import Patience
from opsd_train.rollouts import check_alignment

NEEDS = {
    "ids": "its V2 model runner (a GPU, or a CPU with triton-cpu) and --max-logprobs of at least "
    "teacher_served_top_k; --teacher-scores vocabulary with --max-logprobs -1 does without the runner",
    "vocabulary": "--max-logprobs -1",
}
SCORES = tuple(NEEDS)
CHUNK = 64  # positions whose logits are held at a time


@dataclass(frozen=True)
class ServedRule:
    """How a served teacher is asked.

    Args:
        url: of the server.
        top_k: the student's most likely tokens that are asked for.
        scores: `ids` asks for these alone, `vocabulary` for all log-probs.
        concurrency: requests at once.
        patience: when a call is given up.
    """

    url: str
    top_k: int = 64
    scores: str = "ids"
    concurrency: int = 64
    patience: Patience = field(default_factory=Patience)


class Scorer:
    """Asks a server for log-probs of tokens after given ones.

    Args:
        rule: how.
        tokenizer: of the student.

    Raises:
        ValueError: the server has another vocabulary, or cannot say what it is asked for.
        EngineError: it does not answer.
    """

    def __init__(self, rule: ServedRule, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rule = rule
        self.client = ServerClient(rule.url, rule.patience, option="teacher_url")
        self.name = served_name(self.client)
        check_vocabulary(self.client, tokenizer, "teacher_url")
        self.size = len(tokenizer)
        last = self.size - 1
        try:
            self.score([[0, last, 0]], [np.array([[0, last]])])
        except StatusError as error:
            raise ValueError(
                f"teacher_url: expected a vLLM server with --enable-scale-out that answers with "
                f"teacher_scores {rule.scores!r}, which needs {NEEDS[rule.scores]}; {error}"
            ) from None

    def score(self, sequences: Sequence[Sequence[int]], wanted: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs of tokens at the end of each sequence.

        Args:
            sequences: token ids.
            wanted: int `[n, K]` for each: row j is asked for in place of token j of the last n.

        Returns:
            float32 `[n, K]` for each.
        """
        bodies = [self._body(tokens, ids) for tokens, ids in zip(sequences, wanted, strict=True)]
        answers = self.client.post_all(GENERATE, bodies, self.rule.concurrency, self._quiet(sequences))
        found = [self._read(answer, ids) for answer, ids in zip(answers, wanted, strict=True)]
        for values, ids in zip(found, wanted, strict=True):
            # A token that cannot come is -inf; a NaN, a gain or another shape is not a log-prob of these.
            if values.shape != ids.shape or not bool((values <= 1e-3).all()):
                raise EngineError(
                    f"vLLM server at {self.client.url}: expected log-probs of shape {ids.shape}; got "
                    f"{values.shape}, the largest {values.max(initial=-math.inf)}"
                )
        return found

    def _quiet(self, sequences: Sequence[Sequence[int]]) -> float:
        """Seconds in which the first of the requests that the server has at once is answered."""
        tokens = sum(sorted(map(len, sequences))[-self.rule.concurrency :])
        entries = self.size if self.rule.scores == "vocabulary" else 0
        return self.rule.patience.reading(tokens, tokens * entries)

    def _body(self, tokens: Sequence[int], ids: np.ndarray) -> dict[str, Any]:
        settings: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        if self.rule.scores == "ids":
            settings["prompt_logprob_token_ids"] = ids.tolist()
            settings["prompt_logprob_start"] = len(tokens) - 1 - len(ids)
        else:
            settings["prompt_logprobs"] = -1
        return {"model": self.name, "token_ids": list(tokens), "sampling_params": settings}

    def _read(self, answer: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
        if self.rule.scores == "ids":
            data = base64.b64decode(answer["prompt_token_id_logprobs"])
            return np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
        rows = answer["prompt_logprobs"][-len(ids) :]
        return np.array(
            [
                [row[str(token)]["logprob"] for token in wanted]
                for row, wanted in zip(rows, ids.tolist(), strict=True)
            ],
            dtype=np.float32,
        )


class ServedReader:
    """A teacher that is asked about the student's most likely tokens.

    Args:
        rule: how.
        tokenizer: of the student.
    """

    def __init__(self, rule: ServedRule, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rule, self.scorer = rule, Scorer(rule, tokenizer)

    @torch.no_grad()
    def read(self, student: Hidden | LogLinear, inputs: Mapping[str, Tensor]) -> TopK:
        """The teacher's log-probs `[B, C, K]` of the student's K most likely tokens at each position.

        Args:
            student: the student's distributions `[B, C]`.
            inputs: a batch as `collate` makes it.

        Raises:
            ValueError: student and teacher do not read the same completions.
            EngineError: the server died, stalled, or answered something else.
        """
        check_alignment(dict(inputs))
        ids = most_likely(student, self.rule.top_k)
        mask = inputs["teacher_attention_mask"].bool()
        counts = inputs["completion_mask"].sum(-1).tolist()
        sequences = [row[own].tolist() for row, own in zip(inputs["teacher_input_ids"], mask, strict=True)]
        wanted = [ids[i, :count].cpu().numpy() for i, count in enumerate(counts)]
        # Behind a completion nothing counts, but it has to be a distribution.
        logprobs = torch.full(ids.shape, -math.log(student_vocabulary(student)))
        for i, found in enumerate(self.scorer.score(sequences, wanted)):
            logprobs[i, : len(found)] = torch.from_numpy(found)
        return TopK(ids, logprobs.to(ids.device))


@torch.no_grad()
def most_likely(source: Hidden | LogLinear, k: int) -> Tensor:
    """The k most likely entries `[B, C, k]`, at most the vocabulary; a few positions' logits at a time."""
    k = min(k, student_vocabulary(source))
    length = source.lead[1]
    parts = [logits(source, at, at + CHUNK).topk(k, dim=-1).indices for at in range(0, length, CHUNK)]
    return torch.cat(parts, dim=1)


def student_vocabulary(source: Hidden | LogLinear) -> int:
    """Rows of the head."""
    one = source if isinstance(source, Hidden) else source.streams[0][1]
    return one.weight.shape[0]
