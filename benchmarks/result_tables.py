"""The tables of docs/results-*.md and docs/likelihood.md, from the CSV files of reports/leaderboard.

    python benchmarks/result_tables.py            # write them
    python benchmarks/result_tables.py --check    # exit 1 where a table is not what the CSV says

A table stands below a comment `<!-- accuracy: FILE ATTACK,... MODEL,... -->` (percent and 95 % Wilson interval of
`FILE.csv`) or `<!-- bits: FILE ATTACK MODEL,... -->` (mean bits/dim, half of its 95 % interval, and the median).
"""

import re
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
PAGES = ("docs/results-digits.md", "docs/results-fashionmnist.md", "docs/likelihood.md")
PLACE = re.compile(r"<!-- (accuracy|bits): (\S+) (\S+) (\S+) -->\n\n(?:\|.*\n)*", re.MULTILINE)


def accuracy_table(rows: pd.DataFrame, attacks: list[str], models: list[str]) -> str:
    """Models down, attacks across: 73.1 [68, 77]."""
    table = rows[rows["metric"] == "accuracy"].set_index(["model", "attack"])
    lines = ["| model | " + " | ".join(attacks) + " |", "|---" * (len(attacks) + 1) + "|"]
    for model in models:
        cells = (table.loc[(model, attack)] for attack in attacks)
        texts = [f"{cell['value']:.1f} [{cell['lower']:.0f}, {cell['upper']:.0f}]" for cell in cells]
        lines.append(f"| {model} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def bits_table(rows: pd.DataFrame, attacks: list[str], models: list[str]) -> str:
    """Budgets down, flows across: 3.114 ± 0.013 [3.118]."""
    found = rows[rows["attack"].str.partition("@")[0].isin(attacks)]
    means = found[found["metric"] == "bits_per_dim"].set_index(["epsilon", "model"])
    medians = found[found["metric"] == "bits_per_dim_median"].set_index(["epsilon", "model"])
    lines = ["| epsilon of 255 | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for epsilon in sorted(found["epsilon"].unique()):
        texts = []
        for model in models:
            cell, median = means.loc[(epsilon, model)], medians.loc[(epsilon, model), "value"]
            digits = 3 if cell["value"] < 10 else 2
            half = (cell["upper"] - cell["lower"]) / 2
            texts.append(f"{cell['value']:.{digits}f} ± {half:.{digits}f} [{median:.{digits}f}]")
        lines.append(f"| {epsilon:g} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def fill_page(text: str) -> str:
    """The page with every marked table as the CSV files have it."""

    def fill(place: re.Match[str]) -> str:
        kind, file, attacks, models = place.groups()
        rows = pd.read_csv(ROOT / "reports" / "leaderboard" / f"{file}.csv")
        table = accuracy_table if kind == "accuracy" else bits_table
        comment = f"<!-- {kind}: {file} {attacks} {models} -->\n\n"
        return comment + table(rows, attacks.split(","), models.split(","))

    return PLACE.sub(fill, text)


def main() -> int:
    """Write the pages, or compare them; the exit code."""
    wrong = 0
    for name in PAGES:
        text = (ROOT / name).read_text()
        filled = fill_page(text)
        if filled == text:
            continue
        wrong = 1
        if "--check" in sys.argv[1:]:
            print(f"{name} is not what reports/leaderboard says; run python benchmarks/result_tables.py")
        else:
            (ROOT / name).write_text(filled)
    return wrong if "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
