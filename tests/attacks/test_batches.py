"""The batch a search on the CPU works in."""

import torch
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.search.batches import CACHE_BYTES, LEAST_BATCH, batch_in_cache, largest_output
from robbench.specs import resolve_attack, threat_models


def test_the_batch_is_the_largest_power_of_two_that_the_cache_holds():
    """By brute force over all of them; the user's own number where it fits."""
    for size in (1, 1000, 21632 * 4, 2**20, 10**8):
        for asked in (1, 7, 32, 33, 100, 256, 1000):
            found = batch_in_cache(size, asked)
            fitting = [2**k for k in range(11) if 2**k <= asked and 2**k * size <= CACHE_BYTES]
            if asked <= LEAST_BATCH or asked * size <= CACHE_BYTES:
                assert found == asked
            else:
                assert found == max([LEAST_BATCH, *fitting])
    assert batch_in_cache(0, 1000) == 1000


def test_the_largest_output_is_that_of_the_widest_layer():
    module = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    assert largest_output(module, module, torch.rand(2, 1, 4, 4)) == 8 * 4 * 4 * 4
    assert largest_output(module, module, torch.rand(0, 1, 4, 4)) == 0
    assert not any(part._forward_hooks for part in module.modules())


def test_a_wide_network_is_searched_in_smaller_batches(classifier, images):
    """Verdicts and counts do not depend on it."""
    ids, x, y = images

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.wide, self.sizes = classifier, nn.Upsample(scale_factor=48), []

        def forward(self, x):
            self.sizes += [len(x)] * torch.is_grad_enabled()
            return self.model(x) + 0.0 * self.wide(x).mean((1, 2, 3))[:, None]

    spec = resolve_attack("aa", "digits", threat_models(), 0.12)
    short = {**spec.parameters, "iterations": 10, "components": ("apgd-ce",)}
    one, module = build_attack(spec.model_copy(update={"parameters": short})), Wide()
    rows = slice(40)
    wide = one.evaluate(Victim(module, "cpu", 48), ids[rows], x[rows], y[rows], 0, 40)
    assert max(module.sizes[:4]) > LEAST_BATCH, "the look at the gradients before the search"
    assert max(module.sizes[2:]) == LEAST_BATCH
    usual = one.evaluate(Victim(classifier, "cpu", 48), ids[rows], x[rows], y[rows], 0, 40)
    assert torch.equal(wide.robust, usual.robust)
    assert torch.equal(wide.backwards[wide.robust], usual.backwards[usual.robust])
