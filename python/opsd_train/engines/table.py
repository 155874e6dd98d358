"""Who can write rollouts. An engine is a module with a function `make`, and a line here.

Nothing is imported before it is asked for: the options and the command line name engines without having them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """An engine that can be chosen.

    Args:
        module: whose `make(config, student, tokenizer, vocabulary)` starts it.
        about: who writes, for the help of `--rollouts`.
    """

    module: str
    about: str


ENGINES = {
    "hf": Kind("opsd_train.engines.hf", "transformers' generate"),
    "vllm": Kind("opsd_train.engines.vllm", "in this process"),
    "vllm-server": Kind("opsd_train.engines.server", "a vLLM server"),
}
