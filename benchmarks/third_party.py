"""Clean values of the public checkpoints in the zoo, beside what their authors published: one Markdown row a value.

Classifiers: accuracy on the whole test split at hand, 95 % Wilson interval. Flow: bits/dim of a seeded subset with
one draw of the dequantisation noise, and importance-weighted with eight; 95 % normal interval over images.

    python benchmarks/third_party.py --checkpoints ../shared/checkpoints --data-dir ../shared/data [--flow-n 10000]
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from robbench.attacks import Victim
from robbench.core.device import resolve_device
from robbench.data import load_dataset, sample_ids
from robbench.data.base import Split
from robbench.models.entry import ZooEntry
from robbench.models.flows.base import FrozenFlow
from robbench.models.loading import load_flow, load_model
from robbench.models.zoo import zoo_entries
from robbench.statistics.accuracy import accuracy
from robbench.statistics.likelihood import bits_per_dim, importance_weighted_bits_per_dim

CLASSIFIERS = ("trades-mnist", "convex-mnist", "convex-fashionmnist", "resnet20-cifar10")
FLOW, DRAWS = "mnist-flow", 8


@dataclass(frozen=True)
class Row:
    """One measured value with its interval; published: the card's, None where it has none."""

    model: str
    metric: str
    n: int
    value: float
    lower: float | None
    upper: float | None
    published: float | None

    def markdown(self, digits: int) -> str:
        """The row of the table, `digits` behind the point."""
        gap = None if self.published is None else self.value - self.published
        numbers = (self.value, self.lower, self.upper, self.published, gap)
        value, lower, upper, published, gap_text = (
            "-" if number is None else f"{number:.{digits}f}" for number in numbers
        )
        interval = f"{lower} to {upper}"
        return (
            f"| {self.model} | {self.metric} | {self.n:,} | {value} | {interval} | {published} | {gap_text} |"
        )


def published(entry: ZooEntry, metric: str) -> float | None:
    """What the authors of a checkpoint report under `metric`, from its card."""
    values = [
        m.value for m in entry.card.measurements if m.metric == metric and m.note.startswith("published")
    ]
    return values[0] if values else None


def classifier_row(entry: ZooEntry, test: Split, batch_size: int) -> Row:
    """Accuracy on every image of the test split."""
    victim = Victim(load_model(entry).module, resolve_device("auto"), batch_size)
    parts = [
        torch.arange(start, min(start + batch_size, len(test))) for start in range(0, len(test), batch_size)
    ]
    right = [victim.clean_logits(test.x(part)).argmax(1) == test.labels[part] for part in parts]
    found = accuracy(torch.cat(right).numpy())
    name = "accuracy"
    return Row(entry.card.name, name, found.n, found.value, found.lower, found.upper, published(entry, name))


def flow_row(entry: ZooEntry, flow: FrozenFlow, test: Split, n: int, draws: int, batch_size: int) -> Row:
    """Importance-weighted bits/dim of n images, drawn by seed 0."""
    ids, device = sample_ids(test, n, seed=0), resolve_device("auto")
    values = []
    for start in range(0, n, batch_size):
        part = ids[start : start + batch_size]
        x, _ = test.by_ids(part)
        with torch.inference_mode():
            bits = importance_weighted_bits_per_dim(flow, x.to(device), draws, seed=0, sample_ids=part)
        values += bits.cpu().tolist()
    found = bits_per_dim(values)
    metric = "bits/dim" if draws == 1 else f"bits/dim, {draws} importance samples"
    mean = float("nan") if found.mean is None else found.mean
    return Row(entry.card.name, metric, n, mean, found.lower, found.upper, published(entry, metric))


def rows(arguments: argparse.Namespace) -> Iterator[tuple[Row, int]]:
    """Every row of the table and the number of its decimals."""
    entries = zoo_entries(checkpoints=arguments.checkpoints)
    for name in CLASSIFIERS:
        entry = entries[name]
        test = load_dataset(entry.card.dataset, arguments.data_dir).test
        yield classifier_row(entry, test, arguments.batch_size), 2
    entry = entries[FLOW]
    test, flow = (
        load_dataset(entry.card.dataset, arguments.data_dir).test,
        load_flow(entry, resolve_device("auto")),
    )
    for n, draws in ((arguments.flow_n, 1), (min(arguments.flow_n, arguments.importance_n), DRAWS)):
        yield flow_row(entry, flow, test, n, draws, arguments.batch_size), 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", help="folder of the downloaded weights")
    parser.add_argument("--data-dir")
    parser.add_argument("--flow-n", type=int, default=10_000, help="images for bits/dim with one draw")
    parser.add_argument(
        "--importance-n", type=int, default=1_000, help="images for the importance-weighted value"
    )
    parser.add_argument("--batch-size", type=int, default=100)
    arguments = parser.parse_args()
    print("| model | metric | n | measured | 95 % interval | published | difference |")
    print("|---|---|---|---|---|---|---|")
    for row, digits in rows(arguments):
        print(row.markdown(digits), flush=True)


if __name__ == "__main__":
    main()
