"""Rollouts for the report: each token coloured by its divergence, with what the teacher wanted instead."""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from opsd_train.watch.record import RolloutRecord, TokenRecord

# Token colours: the level grows with sqrt(KL), which bounds the total variation between two distributions
# (Pinsker), and ends at 4 nats. The scale is fixed, so that colours compare across steps and runs.
LEVELS = 16
FULL_NATS = 4.0
TEACHER_SHOWN_NATS = 0.5  # from here on the teacher's own token is written beneath the student's

MAX_PROBLEMS = 8
MAX_TOKENS = 400
SHORT = 16  # tokens; completions up to here stand side by side
SHARED = 400  # characters at either end of what both read, in the teacher's prompt
EMPTY = "∅"  # a token without text


class Shade(NamedTuple):
    """Background and text colour of a token, `#rrggbb`."""

    background: str
    text: str


def level_of(forward_kl: float | None) -> int | None:
    """Colour level, 0 to `LEVELS`, of a token's forward KL in nats; None where it is not known."""
    if forward_kl is None or math.isnan(forward_kl):
        return None
    return round(LEVELS * math.sqrt(min(max(forward_kl, 0.0), FULL_NATS) / FULL_NATS))


def palette(dark: bool) -> list[Shade]:
    """Shade of each level: one hue, its OKLCH lightness linear from the paper's to the full colour's."""
    paper, full = (0.21, 0.80) if dark else (1.0, 0.42)
    shades = []
    for share in (level / LEVELS for level in range(LEVELS + 1)):
        background = _oklch(paper + (full - paper) * share, min(0.15, 0.24 * share), hue=262)
        white_reads_better = contrast("#ffffff", background) > contrast("#000000", background)
        shades.append(Shade(background, "#ffffff" if white_reads_better else "#000000"))
    return shades


def legend() -> list[tuple[int, float]]:
    """(level, its forward KL in nats) from none to full colour."""
    return [(level, FULL_NATS * (level / LEVELS) ** 2) for level in range(LEVELS + 1)]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two `#rrggbb` colours by WCAG 2, from 1 to 21."""
    darker, lighter = sorted((_luminance(first), _luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _oklch(lightness: float, chroma: float, hue: float) -> str:
    """Convert OKLCH to sRGB with Ottosson's matrices; what sRGB cannot show is clamped."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    clamped = (min(max(c, 0.0), 1.0) for c in linear)
    encoded = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in clamped)
    return "#" + "".join(f"{round(255 * c):02x}" for c in encoded)


def groups(rollouts: Sequence[RolloutRecord]) -> list[dict[str, Any]]:
    """Rollouts before, during and after training, by problem; problems that recur come first."""
    steps = sorted({rollout["step"] for rollout in rollouts})
    if len(steps) > 3:
        middle = min(steps[1:-1], key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
        steps = [steps[0], middle, steps[-1]]
    by_problem: dict[tuple[str, str], list[RolloutRecord]] = {}
    place: dict[tuple[str, str], int] = {}  # where among its step's problems a problem first stands
    for step in steps:
        of_step = [rollout for rollout in rollouts if rollout["step"] == step]
        for index, rollout in enumerate(of_step):
            problem = (rollout["prompt"], rollout["teacher_prompt"])
            place.setdefault(problem, index)
            by_problem.setdefault(problem, []).append(rollout)
    ranked = sorted(
        by_problem, key=lambda problem: (-len({r["step"] for r in by_problem[problem]}), place[problem])
    )
    return [
        {
            "student": [(False, prompt)],
            "teacher": _added(prompt, teacher_prompt),
            "answer": by_problem[prompt, teacher_prompt][0]["answer"],
            "short": all(len(one["tokens"]) <= SHORT for one in by_problem[prompt, teacher_prompt]),
            "rollouts": [_drawn(rollout) for rollout in by_problem[prompt, teacher_prompt]],
        }
        for prompt, teacher_prompt in ranked[:MAX_PROBLEMS]
    ]


def _added(prompt: str, teacher_prompt: str) -> list[tuple[bool, str]]:
    """Split the teacher's prompt into (is it the teacher's alone, text) by what both start and end with."""
    shortest = min(len(prompt), len(teacher_prompt))
    head = next((i for i in range(shortest) if prompt[i] != teacher_prompt[i]), shortest)
    rest = shortest - head
    tail = next((i for i in range(rest) if prompt[-1 - i] != teacher_prompt[-1 - i]), rest)
    end = len(teacher_prompt) - tail
    parts = teacher_prompt[:head], teacher_prompt[head:end], teacher_prompt[end:]
    return [(False, _shortened(parts[0])), (True, parts[1]), (False, _shortened(parts[2]))]


def _shortened(text: str) -> str:
    """What the student reads as well, less its middle, so that what the teacher alone reads is in sight."""
    left_out = len(text) - 2 * SHARED
    if left_out <= SHARED:
        return text
    return f"{text[:SHARED]}\n[… {left_out:,} characters that the student reads too …]\n{text[-SHARED:]}"


def has_empty(rollouts: Sequence[RolloutRecord]) -> bool:
    """Whether a token without text is shown, written or wanted."""
    return any(not token["text"] or not token["teacher_top"] for one in rollouts for token in one["tokens"])


def _drawn(rollout: RolloutRecord) -> dict[str, Any]:
    tokens = rollout["tokens"]
    known = [token["forward_kl"] for token in tokens if token["forward_kl"] is not None]
    return {
        "step": rollout["step"],
        "correct": rollout["correct"],
        "mean_kl": sum(known) / len(known) if known else None,
        "tokens": [drawn_token(token) for token in tokens[:MAX_TOKENS]],
        "left_out": max(len(tokens) - MAX_TOKENS, 0),
    }


def drawn_token(token: TokenRecord) -> dict[str, Any]:
    """A token's text, colour level and numbers, for the page."""
    forward_kl, wanted = token["forward_kl"], token["teacher_top_prob"]
    words = [
        f"forward KL {_or_unknown(forward_kl, '{:.3f} nats')}",
        f"student's probability {_probability(token['student_logprob'])}",
        f"teacher's probability {_probability(token['teacher_logprob'])}",
        f"student's entropy {_or_unknown(token['student_entropy'], '{:.3f} nats')}",
        f"teacher's first choice {visible(token['teacher_top'])} at {_or_unknown(wanted, '{:.1%}')}",
    ]
    return {
        "text": visible(token["text"], keep_spaces=True),
        "breaks": token["text"].count("\n"),
        "level": level_of(forward_kl),
        "title": "\n".join(words),
        "shown": forward_kl is not None and forward_kl >= TEACHER_SHOWN_NATS,
        "agrees": token["teacher_top"] == token["text"],
        "wanted": visible(token["teacher_top"]),
        "share": _or_unknown(wanted, "{:.0%}"),
    }


def visible(text: str, keep_spaces: bool = False) -> str:
    """Stand-ins for what cannot be seen in a token: line ends, tabs, control characters, outer spaces."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    text = "".join("\ufffd" if unicodedata.category(character) == "Cc" else character for character in text)
    if not keep_spaces:
        inner = text.lstrip(" ")
        text = (
            "␣" * (len(text) - len(inner)) + inner.rstrip(" ") + "␣" * (len(inner) - len(inner.rstrip(" ")))
        )
    return text or EMPTY


def _probability(logprob: float | None) -> str:
    return "unknown" if logprob is None else f"{math.exp(logprob):.1%} (log {logprob:.2f})"


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)
