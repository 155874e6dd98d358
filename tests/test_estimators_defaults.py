"""Defaults are the published ones, as the methods' papers and released code have them."""

import inspect

import pytest

from opsd_kernels.estimators import advantage, estimator, surrogate
from opsd_kernels.preparers import prepare
from opsd_kernels.weights import weight

PUBLISHED = [
    (estimator, "sgsd", {"tau": 1.0}),
    (estimator, "contrast", {"margin": 0.1}),
    (advantage, "extrapolated", {"coefficient": 1.25}),
    (advantage, "penalty", {"form": "k3", "penalty_clip": 10.0}),
    (advantage, "rlsd", {"mix": 0.5, "width": 0.2}),
    (advantage, "cepo", {"mix": 0.5, "width": 0.2}),
    (advantage, "rlrt", {"mix": 0.5, "width": 1.0}),
    (advantage, "rlcsd", {"tau": 0.02, "strength": 0.5}),
    (weight, "contrast_gate", {"tau": 0.02, "strength": 0.5, "threshold": 0.02}),
    (weight, "prefix_trust", {"gain": 0.5}),
    (surrogate, "ppo", {"low": 0.2, "high": 0.2, "dual": None}),
    (surrogate, "cispo", {"cap": 5.0}),
    (weight, "position_sigmoid", {"floor": 0.25, "center": 0.3, "width": 0.1}),
    (weight, "skip_first", {"tokens": 3}),
    (weight, "length_gate", {"tokens": 2048}),
    (weight, "cord", {"top": 20}),
    (weight, "entropy_prefix", {"limit": 0.1}),
    (weight, "srpo", {"beta": 1.0}),
    (weight, "entropy_gate", {"of": "teacher", "threshold": 0.8}),
    (weight, "top_entropy", {"share": 0.2, "of": "student"}),
    (weight, "tip", {"share": 0.5}),
    (weight, "ta_opd", {"share": 0.05}),
    (weight, "top_divergence", {"share": 0.1}),
    (weight, "likely", {"floor": -5.0}),
    (weight, "reward_at_least", {"threshold": 1.0}),
    (weight, "is_weight", {"cap": 2.0}),
    (weight, "tis", {"cap": 2.0}),
    (weight, "icepop", {"low": 0.5, "high": 5.0}),
    (weight, "mixed_sampling", {"share": 0.2}),
    (weight, "scope", {"tau": 1.0, "count": False}),
    (weight, "likely_rows", {"share": 0.8}),
    (weight, "step", {"delta": 0.2, "eps": 1e-6}),
    (weight, "unisd_token", {"gamma": 0.001, "level": 0.95, "floor": 0.01}),
    (weight, "confidence", {"tau": 1.0}),
    (prepare, "reward_to_go", {"scale": 0.5, "clip": 100.0, "discount": 1.0}),
    (prepare, "polarity", {"clip": 3.0, "threshold": 0.05}),
    (prepare, "margin_calibration", {"delta": 0.4, "mode": "both", "limit": 10.0}),
    (prepare, "omniopd", {"samples": 10}),
    (prepare, "acpo_bounds", {"base": 0.2, "alpha": 3.0, "smallest": 0.0, "largest": 3.0, "bins": 5}),
]


@pytest.mark.parametrize(("registry", "name", "options"), PUBLISHED, ids=[name for _, name, _ in PUBLISHED])
def test_published_defaults(registry, name, options):
    parameters = inspect.signature(registry[name]).parameters
    assert {option: parameters[option].default for option in options} == options


@pytest.mark.parametrize("registry", [estimator, advantage, surrogate, weight, prepare], ids=lambda r: r.kind)
def test_options_are_keywords_of_plain_types(registry):
    """So that they can be written in a file: numbers, strings, bools and None."""
    for name, function in registry.functions.items():
        for parameter in list(inspect.signature(function).parameters.values()):
            if parameter.name in ("x", "a", "batch"):
                continue
            assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD), name
            default = parameter.default
            plain = default is None or isinstance(default, bool | int | float | str)
            assert plain or default is parameter.empty, name
