"""What a library does to the whole process, undone: a second engine in it must not change the training."""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from opsd_train.rollouts import seeded


@contextmanager
def undisturbed(device: torch.device, environment: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for what happens inside; afterwards they, and the process, are as before.

    That is: every variable that had a value, the global random states of Python, NumPy and torch, and torch's
    number of threads with the function that sets it. Variables that are new stay.

    Args:
        device: whose random state is kept, beside the CPU's.
        environment: values by name.
    """
    before, threads, set_threads = dict(os.environ), torch.get_num_threads(), torch.set_num_threads
    os.environ.update(environment)
    try:
        with _host_random(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        os.environ.update(before)
        for name in environment.keys() - before.keys():
            del os.environ[name]


@contextmanager
def determined(device: torch.device, seed: Sequence[int]) -> Iterator[None]:
    """Global random states are functions of `seed` inside, and afterwards what they were."""
    with _host_random(), seeded(device, seed):
        drawn = int(np.random.SeedSequence(seed).generate_state(1)[0])
        np.random.seed(drawn)
        random.seed(drawn)
        yield


@contextmanager
def _host_random() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
