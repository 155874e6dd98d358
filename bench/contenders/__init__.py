"""What is compared: one list. Each contender computes the mean loss and fills `.grad` of the leaves."""

from bench.contenders.base import Contender
from bench.contenders.compiled import COMPILED, static_compilation
from bench.contenders.ours import ENGINE, OURS
from bench.contenders.peers import PEERS
from bench.contenders.plain import EAGER, FLOOR, PLAIN

CONTENDERS: tuple[Contender, ...] = (*PLAIN, *COMPILED, *PEERS, *OURS)

__all__ = ["CONTENDERS", "EAGER", "ENGINE", "FLOOR", "Contender", "choose", "static_compilation"]


def choose(words: list[str], *, compiled: bool = True) -> list[Contender]:
    """The contenders whose name contains one of the words (all without words), and always the two yardsticks.

    `compiled=False` leaves out those that wait for torch.compile.
    """

    def wanted(contender: Contender) -> bool:
        if contender.name in (FLOOR, EAGER):
            return True
        named = not words or any(word.lower() in contender.name.lower() for word in words)
        return named and (compiled or not contender.compiles)

    return [contender for contender in CONTENDERS if wanted(contender)]
