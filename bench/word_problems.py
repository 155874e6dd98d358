"""Generated word problems with worked solutions, to train and judge a small language model on.

    python -m bench.word_problems --rows 512 --seed 0 --held-out 128 --out problems

writes `train.jsonl` and `held_out.jsonl` with the columns prompt, teacher_prompt and answer. The student
reads the problem; the teacher has it answered already and is asked to answer once more, which a model of
135 M parameters does far better than solving. The rows are a function of the seed, and no two are the same.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Karim", "Lena")
THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "tickets")
PLACES = ("boxes", "bags", "baskets", "drawers", "jars", "shelves")
ASKED = "Write down the calculation, then the answer."
AGAIN = "Thank you. Say it once more:"

Kind = Callable[[random.Random], tuple[str, str, int]]


def gain(draw: random.Random) -> tuple[str, str, int]:
    """Addition."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    a, b = draw.randint(2, 12), draw.randint(2, 12)
    problem = f"{name} has {a} {thing} and finds {b} more. How many {thing} does {name} have now?"
    return problem, f"{a} + {b} = {a + b}.", a + b


def loss(draw: random.Random) -> tuple[str, str, int]:
    """Subtraction."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    a = draw.randint(5, 20)
    b = draw.randint(1, a - 1)
    problem = f"{name} has {a} {thing} and gives {b} away. How many {thing} does {name} have left?"
    return problem, f"{a} - {b} = {a - b}.", a - b


def groups(draw: random.Random) -> tuple[str, str, int]:
    """Multiplication."""
    name, thing, place = draw.choice(NAMES), draw.choice(THINGS), draw.choice(PLACES)
    a, b = draw.randint(2, 6), draw.randint(2, 10)
    problem = f"{name} has {a} {place} with {b} {thing} in each. How many {thing} does {name} have in all?"
    return problem, f"{a} * {b} = {a * b}.", a * b


def gain_and_loss(draw: random.Random) -> tuple[str, str, int]:
    """Addition, then subtraction."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    a, b = draw.randint(2, 10), draw.randint(2, 10)
    c = draw.randint(1, a + b - 1)
    problem = (
        f"{name} has {a} {thing}, finds {b} more and gives {c} away. How many {thing} does {name} have now?"
    )
    return problem, f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.", a + b - c


KINDS: tuple[Kind, ...] = (gain, loss, groups, gain_and_loss)


def rows(seed: int) -> Iterator[dict[str, Any]]:
    """Different problems without end."""
    draw, seen = random.Random(seed), set()
    while True:
        problem, steps, answer = draw.choice(KINDS)(draw)
        if problem not in seen:
            seen.add(problem)
            asked = {"role": "user", "content": f"{problem} {ASKED}"}
            solved = {"role": "assistant", "content": f"{steps} The answer is {answer}."}
            again = {"role": "user", "content": f"{AGAIN} {problem} {ASKED}"}
            yield {"prompt": [asked], "teacher_prompt": [asked, solved, again], "answer": str(answer)}


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("problems"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    source = rows(given.seed)
    for name, count in (("held_out", given.held_out), ("train", given.rows)):
        lines = [json.dumps(next(source)) + "\n" for _ in range(count)]
        (given.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
