"""Arguments of the vLLM server that a run starts, as far as they concern who reaches it."""

import shlex
from dataclasses import dataclass

OPENING = ("host", "uds", "config")  # where it listens, or a file that may say it


@dataclass(frozen=True)
class ServerArguments:
    """Arguments without the API key, the key, and which of them change where the server listens."""

    words: tuple[str, ...] = ()
    api_key: str | None = None
    opening: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> "ServerArguments":
        """From a line as a shell takes it; ValueError for quotes without an end, and for several keys."""
        try:
            given = shlex.split(text)
        except ValueError as error:
            raise ValueError(f"vllm_server_args: expected arguments as a shell takes them; {error}") from None
        words: list[str] = []
        keys: list[str] = []
        opening = []
        while given:
            word = given.pop(0)
            name, equals, value = word.partition("=")
            if _is(name, "api-key"):
                keys += [value] if equals else given[:1]
                given = given[0 if equals else 1 :]
                if not keys or not keys[-1] or (given and not given[0].startswith("-")):
                    raise ValueError("vllm_server_args: expected one key behind `--api-key`")
                continue
            opening += [f"--{one}" for one in OPENING if _is(name, one)]
            if _is(name, "port"):
                raise ValueError("vllm_server_args: expected no --port, since vllm_url says it")
            words.append(word)
        if len(keys) > 1:
            raise ValueError(f"vllm_server_args: expected `--api-key` once, got it {len(keys)} times")
        return cls(tuple(words), keys[0] if keys else None, tuple(opening))

    def check(self, public: bool) -> None:
        """ValueError for a server that others than this machine may reach, unless it may and has a key.

        A server in development mode loads the weights, and runs the methods, that anybody asks it for.
        """
        if not self.opening:
            return
        if not public:
            raise ValueError(
                f"vllm_server_args: expected no {self.opening[0]}, which may open the development server to "
                "whoever reaches this machine; if that is meant, add --vllm-public and a key"
            )
        if self.api_key is None:
            raise ValueError(
                f"vllm_server_args: expected `--api-key` beside {self.opening[0]}, since the server obeys "
                "whoever reaches it; got none"
            )


def _is(word: str, name: str) -> bool:
    """Whether a word is an option or a beginning of it that argparse takes for it."""
    written = word.replace("_", "-")
    return len(written) >= 4 and f"--{name}".startswith(written)
