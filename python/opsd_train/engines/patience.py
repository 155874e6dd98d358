"""How long an engine may take over a call: the one place where that is decided."""

from dataclasses import dataclass

RATE = 100e6  # bytes per second: a slow network disk; whatever moves weights does more
FOUND = 0.9  # share of the stall limit that a call may take; the rest is for looking, and for saying so
TOKEN = 100_000  # a token that is read counts as so many bytes: a thousand of them per second
LOGPROB = 1_000  # and a log-prob that is answered as JSON: a hundred thousand per second
REQUEST = 600.0  # seconds that one of many requests may wait while others are answered


@dataclass(frozen=True)
class Patience:
    """When a call is given up.

    A call that moves weights is allowed what these take at `RATE`, so that a transfer of a small model that
    stands still is found within `stall` seconds, and one of 140 GB is not cut off before 24 minutes.

    Args:
        stall: seconds within which an engine that stands still is found.
        call: seconds of every transfer of weights and of every single request, in place of what is said here.
    """

    stall: float = 30.0
    call: float | None = None

    @property
    def answer(self) -> float:
        """Seconds of a call that moves nothing to speak of."""
        return FOUND * self.stall

    def moving(self, size: float) -> float:
        """Seconds of a call that moves so many bytes."""
        return self.answer + size / RATE if self.call is None else self.call

    def reading(self, tokens: int, logprobs: int) -> float:
        """Seconds in which one of several requests is answered that have so many in all."""
        return min(self.moving(tokens * TOKEN + logprobs * LOGPROB), self.request)

    @property
    def request(self) -> float:
        """Seconds of one of many requests, which others may be in front of."""
        return REQUEST if self.call is None else self.call
