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


def gains_and_losses(draw: random.Random) -> tuple[str, str, int]:
    """Addition, then subtraction."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    a, b = draw.randint(5, 60), draw.randint(5, 40)
    c = draw.randint(2, a + b - 1)
    problem = (
        f"{name} has {a} {thing}, finds {b} more and gives {c} away. How many {thing} does {name} have now?"
    )
    return problem, f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.", a + b - c


def equal_groups(draw: random.Random) -> tuple[str, str, int]:
    """Multiplication, then addition."""
    name, thing, place = draw.choice(NAMES), draw.choice(THINGS), draw.choice(PLACES)
    a, b, c = draw.randint(2, 9), draw.randint(2, 12), draw.randint(2, 20)
    problem = (
        f"{name} has {a} {place} with {b} {thing} in each, and {c} {thing} besides. "
        f"How many {thing} does {name} have in all?"
    )
    return problem, f"{a} * {b} = {a * b}. {a * b} + {c} = {a * b + c}.", a * b + c


def change(draw: random.Random) -> tuple[str, str, int]:
    """Multiplication, then subtraction."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    a, b = draw.randint(2, 9), draw.randint(2, 9)
    paid = a * b + draw.randint(1, 30)
    problem = (
        f"{name} buys {a} {thing} for {b} dollars each and pays with {paid} dollars. How much change is due?"
    )
    return problem, f"{a} * {b} = {a * b}. {paid} - {a * b} = {paid - a * b}.", paid - a * b


def sharing(draw: random.Random) -> tuple[str, str, int]:
    """Addition, then division without a remainder."""
    first, second = draw.sample(NAMES, 2)
    thing, friends, each = draw.choice(THINGS), draw.randint(2, 9), draw.randint(2, 12)
    a = draw.randint(1, friends * each - 1)
    b = friends * each - a
    problem = (
        f"{first} brings {a} {thing} and {second} brings {b}. They share them equally "
        f"among {friends} friends. How many {thing} does each friend get?"
    )
    return problem, f"{a} + {b} = {a + b}. {a + b} / {friends} = {each}.", each


def difference(draw: random.Random) -> tuple[str, str, int]:
    """A sum of one number and that number plus another."""
    first, second = draw.sample(NAMES, 2)
    thing, a, b = draw.choice(THINGS), draw.randint(3, 40), draw.randint(2, 30)
    problem = (
        f"{first} has {a} {thing}. {second} has {b} more than {first}. How many {thing} have they together?"
    )
    return problem, f"{a} + {b} = {a + b}. {a} + {a + b} = {a + a + b}.", a + a + b


KINDS: tuple[Kind, ...] = (gains_and_losses, equal_groups, change, sharing, difference)


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
