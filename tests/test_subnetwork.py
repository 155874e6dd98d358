"""Masks against a sort of all distances, and training that leaves the rest as it was."""

from pathlib import Path

import pytest
import torch

from driver_tiny import tiny_model, tiny_trainer
from opsd_train.pieces.subnetwork import from_checkpoints, load_masks, moved_most, restrict, save_masks


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(7, 5, generator=generator),
        "b": 10 * torch.randn(11, generator=generator),
        "c": torch.zeros(3, 3),
    }


@pytest.mark.parametrize("share", [0.02, 0.1, 0.33, 0.7])
def test_top_share_over_all_tensors_together(share: float) -> None:
    before, after = weights(0), weights(1)
    masks = moved_most(before, after, share)
    distances = {name: (after[name] - before[name]).abs() for name in before}
    ranked = torch.cat([one.flatten() for one in distances.values()]).sort(descending=True).values
    bound = ranked[round(share * 55) - 1]
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, distances[name] >= bound)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(share * 55)


def test_entries_that_did_not_move_are_never_in() -> None:
    masks = moved_most(weights(0), weights(1), 1.0)
    assert bool(masks["a"].all())
    assert not bool(masks["c"].any())


def test_bf16_differences_are_taken_in_fp32() -> None:
    before = {"a": torch.tensor([1.0, 1.0, 0.5]).bfloat16()}
    after = {"a": torch.tensor([-(2.0**-8), 0.0, 0.5]).bfloat16()}  # in bf16 both first distances are 1
    assert moved_most(before, after, 0.3)["a"].tolist() == [True, False, False]
    assert moved_most(before, after, 0.6)["a"].tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("after", "share", "message"),
    [
        ({"a": torch.ones(2)}, 0.5, "after: expected the tensors of `before`; they differ in b"),
        ({"a": torch.ones(3), "b": torch.ones(1)}, 0.5, "they differ in a"),
        ({"a": torch.zeros(2), "b": torch.zeros(1)}, 0.5, "after: expected weights that differ"),
        ({"a": torch.tensor([1, torch.nan]), "b": torch.zeros(1)}, 0.5, "the difference of a is not"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, 0.0, "share: expected a number above 0, at most 1; got 0"),
    ],
)
def test_wrong_checkpoints(after: dict, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moved_most({"a": torch.zeros(2), "b": torch.zeros(1)}, after, share)


def test_masks_of_checkpoints_through_a_file(tmp_path: Path) -> None:
    before, after = tiny_model(0), tiny_model(1)
    before.save_pretrained(tmp_path / "before", max_shard_size="20KB")
    after.save_pretrained(tmp_path / "after")
    masks = from_checkpoints(tmp_path / "before", tmp_path / "after", 0.25)
    expected = moved_most(dict(before.named_parameters()), dict(after.named_parameters()), 0.25)
    save_masks(masks, tmp_path / "masks.safetensors")
    read = load_masks(tmp_path / "masks.safetensors")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="subnetwork: expected bool masks"):
        load_masks(tmp_path / "after" / "model.safetensors")
    with pytest.raises(ValueError, match="subnetwork: expected a file of masks at"):
        load_masks(tmp_path / "none")
    with pytest.raises(ValueError, match="checkpoint: expected safetensors"):
        from_checkpoints(tmp_path / "none", tmp_path / "after", 0.25)


def test_training_moves_the_sub_network_alone(tmp_path: Path) -> None:
    model = tiny_model()
    named = dict(model.named_parameters())
    before = {name: one.detach().clone() for name, one in named.items()}
    after = {name: one + torch.randn_like(one) for name, one in before.items()}
    kept = {name: after[name] if "mlp" in name else before[name] for name in before}
    masks = moved_most(before, kept, 0.1)
    lift = restrict(model, masks)
    assert not named["model.embed_tokens.weight"].requires_grad
    trainer = tiny_trainer(tmp_path, model=model)
    trainer.train()
    changed = {name: one.detach() != before[name] for name, one in model.named_parameters()}
    assert sum(int(one.sum()) for one in changed.values()) > 50
    assert not any(bool((one & ~masks[name]).any()) for name, one in changed.items())
    lift()
    assert all(one.requires_grad for one in model.parameters())
    model.zero_grad()
    model(torch.tensor([[5, 6]])).logits.sum().backward()
    assert bool(named["model.layers.0.mlp.up_proj.weight"].grad.all())


def test_infinite_gradients_outside_do_no_harm() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    restrict(model, {"weight": torch.tensor([[True, False]])})
    model(torch.tensor([1.0, torch.inf])).sum().backward()
    assert model.weight.grad.tolist() == [[1.0, 0.0]]


def test_masks_of_another_model() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    for masks, message in [
        ({"w": torch.ones(1, 2, dtype=torch.bool)}, "expected w of shape .* got no such trained parameter"),
        ({"weight": torch.ones(2, dtype=torch.bool)}, r"got \(1, 2\)"),
        ({"weight": torch.zeros(1, 2, dtype=torch.bool)}, "expected at least one entry to train"),
    ]:
        with pytest.raises(ValueError, match=message):
            restrict(model, masks)
