"""Whether the bound on learned prior widths caps the bits/dim that likelihood attacks reach.

Learned priors keep log sigma inside (-8, 8) by 8 tanh(raw / 8) (`robbench.models.flows.layers.MAX_LOG_SIGMA`); the
reference Glow has no bound. The flow is frozen twice, with the bound and practically without (1e6), both in float64 for
the scores. Each is attacked by itself, and the images found on the bounded flow are scored without the bound as well.

    python benchmarks/prior_bound.py --model digits-glow --epsilon 0,32,64,128,255 --n 120
"""

import argparse

import numpy as np
import torch

from robbench.attacks import build_likelihood_attack
from robbench.data import load_dataset, sample_ids
from robbench.models.flows import layers
from robbench.models.flows.base import Flow, FrozenFlow
from robbench.models.loading import _trained_flow
from robbench.models.zoo import zoo_entries
from robbench.specs import resolve_attack, threat_models
from robbench.statistics.likelihood import bits_per_dim

UNBOUNDED = 1e6  # raw widths are far below it, so that the tanh is the identity to rounding


def frozen(flow: Flow, bound: float, dtype: torch.dtype) -> FrozenFlow:
    """The flow with another bound on the log widths of its priors."""
    before, layers.MAX_LOG_SIGMA = layers.MAX_LOG_SIGMA, bound
    try:
        return flow.freeze(dtype)
    finally:
        layers.MAX_LOG_SIGMA = before


def text(values: np.ndarray) -> str:
    """ "8.80 (median 8.61)", and how many are not finite."""
    found = bits_per_dim(values)
    lost = f", {found.n - found.n_finite} not finite" if found.n_finite < found.n else ""
    return f"{found.mean:.4g} (median {found.median:.4g}{lost})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits-glow", help="a Glow of the zoo with learned priors")
    parser.add_argument("--epsilon", default="0,32,64,128,255", help="of 255")
    parser.add_argument("--n", type=int, default=120)
    parser.add_argument("--data-dir")
    arguments = parser.parse_args()
    entry = zoo_entries()[arguments.model]
    flow = _trained_flow(entry, "cpu")
    test = load_dataset(entry.card.dataset, arguments.data_dir).test
    ids = torch.tensor(sample_ids(test, arguments.n, seed=0))
    x, y = test.by_ids(ids.tolist())
    bounds = (layers.MAX_LOG_SIGMA, UNBOUNDED)
    searched = [frozen(flow, bound, torch.float32) for bound in bounds]
    judges = [frozen(flow, bound, torch.float64) for bound in bounds]
    print(f"{arguments.model}, nll-in (32 steps), n = {arguments.n}, seed 0; mean bits/dim in float64")
    print(
        "| epsilon | bounded | the same images, no bound | attacked without the bound | largest log width |"
    )
    print("|---|---|---|---|---|")
    for epsilon in map(float, arguments.epsilon.split(",")):
        spec = resolve_attack("nll-in", entry.card.dataset, threat_models(None), epsilon)
        attack = build_likelihood_attack(spec)
        ours = attack.evaluate(searched[0], judges[0], ids, x, y, 0, 120)
        free = attack.evaluate(searched[1], judges[1], ids, x, y, 0, 120)
        with torch.no_grad():
            again = judges[1].bits_per_dim(ours.adversarial, seed=0, sample_ids=ids.tolist()).double()
            moments = judges[1]._encoded(free.adversarial, None, 0.5).moments
        widest = max(float(log_sigma.abs().max()) for _, log_sigma in moments)
        cells = [text(part.numpy()) for part in (ours.nll_after, again, free.nll_after)]
        print(f"| {epsilon:g} | {cells[0]} | {cells[1]} | {cells[2]} | {widest:.3g} |", flush=True)


if __name__ == "__main__":
    main()
