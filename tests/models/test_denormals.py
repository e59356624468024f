"""Denormal weights: gone after loading, and nothing the model says has changed."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from robbench.cards import Weights
from robbench.core.resources import sha256_file
from robbench.models.entry import ZooEntry
from robbench.models.loading import load_model
from robbench.models.zoo import zoo_entries


def test_loaded_weights_have_no_denormals_and_the_same_logits():
    entry = zoo_entries()["digits-at"]
    stored = load_file(entry.folder / entry.card.weights.file)
    tiny = torch.finfo(torch.float32).tiny
    count = sum(int(((value != 0) & (value.abs() < tiny)).sum()) for value in stored.values())
    assert count > 100, "the shipped weights have some; otherwise this test shows nothing"
    module = load_model(entry).module
    x = torch.rand(64, *entry.card.input_shape, generator=torch.Generator().manual_seed(0))
    logits = module(x)
    assert all(not ((value != 0) & (value.abs() < tiny)).any() for value in module.state_dict().values())
    module.load_state_dict(stored)
    torch.testing.assert_close(logits, module(x), rtol=0, atol=0)


def test_denormals_of_float16_are_weights(tmp_path: Path):
    """A weight of 3e-5 is denormal in a float16 file and an ordinary number in the float32 network."""
    shipped = zoo_entries()["digits-at"]
    state = load_file(shipped.folder / shipped.card.weights.file)
    stored = {name: (value * 1e-3).half() for name, value in state.items()}
    save_file(stored, tmp_path / "half.safetensors")
    weights = Weights(file="half.safetensors", sha256=sha256_file(tmp_path / "half.safetensors"))
    card = shipped.card.model_copy(update={"weights": weights, "golden": None})
    loaded = load_model(ZooEntry(card, tmp_path)).module.state_dict()
    assert all(torch.equal(value.float(), loaded[name]) for name, value in stored.items())
