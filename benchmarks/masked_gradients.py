"""A small MNIST network with masked gradients: trained on single-step FGSM examples at epsilon 0.3.

    python benchmarks/masked_gradients.py train --data-dir DATA --out FOLDER
    python benchmarks/masked_gradients.py tf32 --data-dir DATA --model FOLDER/mnist-fgsm

`train` writes a folder with a card that `robbench bench aa --zoo FOLDER --model mnist-fgsm` takes (a few minutes of one
core). `tf32` counts the images that stay robust when the search alone computes in TF32, simulated on any device, beside
searches in fp32 and the reference package: docs/autoattack.md.
"""

import argparse
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robbench.attacks import Victim, build_attack
from robbench.cards import Architecture
from robbench.core.resources import sha256_file
from robbench.data import load_dataset, sample_ids
from robbench.models.loading import build_architecture, load_model
from robbench.models.zoo import read_entry
from robbench.specs import resolve_attack, threat_models

NAME, ARCHITECTURE, SEEDS = "mnist-fgsm", "convex-small-cnn", (0, 1, 2)
EPSILON, STEP = 0.3, 0.375  # of training (Wong, Rice and Kolter 2020, "Fast is better than free")


def train(out: Path, data_dir: Path, epochs: int) -> None:
    """Train the network and write its folder, a card beside a state dict, anew after every epoch."""
    dataset, folder = load_dataset("mnist", data_dir), out / NAME
    x, y = dataset.train.x(torch.arange(len(dataset.train))), dataset.train.labels
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build_architecture(
        Architecture(name=ARCHITECTURE), dataset.shape, dataset.classes, dataset.grey_levels
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            attacked = _single_step(model, x[rows], y[rows])
            optimizer.zero_grad()
            cross_entropy(model(attacked), y[rows]).backward()
            optimizer.step()
        some = torch.arange(1000)
        clean, single = (
            _accuracy(model, z, y[some]) for z in (x[some], _single_step(model, x[some], y[some]))
        )
        print(f"epoch {epoch + 1} of {epochs}: clean {clean:.1f} %, single step {single:.1f} %", flush=True)
        torch.save(model.state_dict(), folder / "weights.pt")
        (folder / "card.yaml").write_text(yaml.safe_dump(_card(folder), sort_keys=False))


def _single_step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One sign step from a uniform random point of the ball, back into ball and box."""
    start = (x + torch.empty_like(x).uniform_(-EPSILON, EPSILON)).clamp(0.0, 1.0).requires_grad_(True)
    (slope,) = torch.autograd.grad(cross_entropy(model(start), y), start)
    moved = start.detach() + STEP * slope.sign()
    return torch.min(torch.max(moved, x - EPSILON), x + EPSILON).clamp(0.0, 1.0)


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * float((model(x).argmax(1) == y).float().mean())


def _card(folder: Path) -> dict[str, object]:
    return {
        "name": NAME,
        "kind": "classifier",
        "description": f"trained on single-step FGSM examples (Linf {EPSILON}), which masks its gradients",
        "dataset": "mnist",
        "defense": "fgsm",
        "architecture": {"name": ARCHITECTURE},
        "input_shape": [1, 28, 28],
        "classes": 10,
        "weights": {
            "file": "weights.pt",
            "format": "state-dict",
            "sha256": sha256_file(folder / "weights.pt"),
        },
    }


def rounded(x: Tensor) -> Tensor:
    """x in float32, rounded to the 10 mantissa bits of TF32, ties to even; NaN and infinities stay."""
    bits = x.contiguous().view(torch.int32)
    kept = bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF
    return torch.where(x.isfinite(), kept.view(torch.float32), x)


class _RoundedOperand(torch.autograd.Function):
    """Rounded on the way forward; the slope passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rounded(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope


class _RoundedSlope(torch.autograd.Function):
    """Rounded on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return rounded(slope)


def in_tf32(module: nn.Module) -> nn.Module:
    """A copy of `module` whose convolutions and linear layers multiply TF32 operands and add in float32, forward and
    backward, as tensor cores do."""
    copy = deepcopy(module)
    for layer in copy.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight = nn.Parameter(rounded(layer.weight.detach()), requires_grad=False)
            layer.register_forward_pre_hook(lambda _, given: (_RoundedOperand.apply(given[0]),))
            layer.register_forward_hook(lambda _, given, out: _RoundedSlope.apply(out))
    return copy


class SimulatedVictim(Victim):
    """Searches see `module` in simulated TF32, verdicts are of `module` itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "cpu")
        self.exact = False
        self.simulated = in_tf32(module)

    def differentiable(self, x: Tensor) -> Tensor:
        return self.simulated(x)


def compare(card: Path, data_dir: Path, n: int, epsilon: float, queries: int) -> None:
    """Print robust counts by seed, a row an attack: of robbench in fp32 and simulated TF32, and of the reference."""
    dataset = load_dataset("mnist", data_dir)
    module = load_model(read_entry(card), torch.device("cpu")).module
    ids = sample_ids(dataset.test, n, 0)
    x, y = dataset.test.by_ids(ids)
    attacks: dict[str, dict[str, object]] = {
        "apgd-ce": {"components": ("apgd-ce",)},
        f"square, {queries} queries": {"components": ("square",), "square_queries": queries},
    }
    contestants = (
        ("aa", Victim(module, "cpu")),
        ("aa", SimulatedVictim(module)),
        ("aa-reference", Victim(module, "cpu")),
    )
    print("| attack | fp32 | simulated TF32 | reference |\n|---|---|---|---|", flush=True)
    for title, parameters in attacks.items():
        row = [title]
        for name, victim in contestants:
            spec = resolve_attack(name, "mnist", threat_models(), epsilon)
            attack = build_attack(spec.model_copy(update={"parameters": {**spec.parameters, **parameters}}))
            outcomes = [attack.evaluate(victim, torch.tensor(ids), x, y, seed, 256) for seed in SEEDS]
            row.append(" / ".join(str(int(outcome.robust.sum())) for outcome in outcomes))
            print(f"{title}, {name}, {type(victim).__name__}: {row[-1]}", file=sys.stderr, flush=True)
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--epochs", type=int, default=5)
    comparison = commands.add_parser("tf32")
    comparison.add_argument("--model", type=Path, required=True)
    comparison.add_argument("--n", type=int, default=200)
    comparison.add_argument("--epsilon", type=float, default=0.2)
    comparison.add_argument("--queries", type=int, default=500)
    for command in (training, comparison):
        command.add_argument("--data-dir", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "train":
        train(given.out, given.data_dir, given.epochs)
    else:
        compare(given.model, given.data_dir, given.n, given.epsilon, given.queries)


if __name__ == "__main__":
    main()
