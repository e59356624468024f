"""Denormal weights: gone after loading, and nothing the model says has changed."""

import torch
from safetensors.torch import load_file

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
