"""The recorded tokens at which teacher and student are furthest apart, each with what stands around it."""

import math
from collections.abc import Sequence
from typing import Any

from opsd_train.report.highlight import TEACHER_SHOWN_NATS, drawn_token, visible
from opsd_train.watch.record import RolloutRecord, TokenRecord

SHOWN = 12
OF_A_ROLLOUT = 2  # one bad rollout would fill the list
BEFORE, AFTER = 24, 8  # tokens of context
PROMPT = 160  # characters of the prompt's end


def worst(rollouts: Sequence[RolloutRecord]) -> list[dict[str, Any]]:
    """The tokens of the largest forward KL, worst first, at least `TEACHER_SHOWN_NATS` each."""
    found = []
    for rollout in rollouts:
        ranked = sorted(range(len(rollout["tokens"])), key=lambda at: -_nats(rollout["tokens"][at]))
        found += [(rollout, at) for at in ranked[:OF_A_ROLLOUT]]
    found = [(one, at) for one, at in found if _nats(one["tokens"][at]) >= TEACHER_SHOWN_NATS]
    found.sort(key=lambda pair: -_nats(pair[0]["tokens"][pair[1]]))
    return [_shown(rollout, at) for rollout, at in found[:SHOWN]]


def _shown(rollout: RolloutRecord, at: int) -> dict[str, Any]:
    tokens, prompt = rollout["tokens"], rollout["prompt"]
    one = tokens[at]
    return {
        "step": rollout["step"],
        "position": at,
        "nats": f"{one['forward_kl']:.2f}",
        "prompt": ("…" if len(prompt) > PROMPT else "") + visible(prompt[-PROMPT:], keep_spaces=True),
        "before": ("…" if at > BEFORE else "") + _text(tokens[max(at - BEFORE, 0) : at]),
        "after": _text(tokens[at + 1 : at + 1 + AFTER]) + ("…" if at + 1 + AFTER < len(tokens) else ""),
        "token": drawn_token(one),
        "student": _percent(one["student_logprob"]),
        "teacher": _percent(one["teacher_logprob"]),
    }


def _nats(token: TokenRecord) -> float:
    found = token["forward_kl"]
    return -math.inf if found is None or math.isnan(found) else found


def _text(tokens: Sequence[TokenRecord]) -> str:
    return "".join(visible(token["text"], keep_spaces=True) for token in tokens)


def _percent(logprob: float | None) -> str:
    if logprob is None:
        return "unknown"
    share = 100 * math.exp(logprob)
    return f"{share:.1f} %" if share >= 0.1 else "below 0.1 %"
