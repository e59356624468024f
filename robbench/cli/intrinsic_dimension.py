"""`robbench show DATASET --intrinsic-dimension`: estimates beside the published number."""

from functools import partial
from pathlib import Path
from typing import Any

from robbench.cli.base import echo_line, print_json, resolve_option
from robbench.core.errors import known_name
from robbench.data.card import read_folder_card
from robbench.data.names import dataset_names
from robbench.experiments.published import published_index, published_table, table_rows
from robbench.report.data_card import is_data_folder

TABLE, METRIC = "er-table2", "estimated_intrinsic_dim"


def show_intrinsic_dimension(name: str, data_dir: Path | None, as_json: bool) -> None:
    """Print the intrinsic dimension of a data set, by name or by the path of its folder."""
    found = measure_intrinsic_dimension(name, data_dir)
    if as_json:
        print_json(found)
        return
    echo_line(
        f"{found['name']}: {found['shape']} pixels in [0,1], {found['images']} different {found['split']} images "
        f"(seed {found['seed']}), k = 6..12"
    )
    for estimator in ("mackay", "levina"):
        echo_line(f"{estimator:10}{found[estimator]:.2f}")
    published = found["published"]
    echo_line(f"{'published':10}{'-' if published is None else f'{published:g} (ER supplement, Table 2)'}")


def measure_intrinsic_dimension(name: str, data_dir: Path | None) -> dict[str, Any]:
    """Both estimates of up to 1,000 training images drawn by seed (test images where there are no others)."""
    from robbench.data import load_dataset
    from robbench.experiments.settings import SEED, estimate_dimension

    dataset = load_dataset(*_place(name, data_dir))
    part, estimate = estimate_dimension(dataset)
    return {
        "name": dataset.name,
        "shape": "x".join(map(str, dataset.shape)),
        "split": part,
        "images": estimate.points,
        "seed": SEED,
        "mackay": estimate.mackay,
        "levina": estimate.levina,
        "published": published_dimension(dataset.name),
    }


def published_dimension(dataset: str) -> float | None:
    """The estimate that ER-Classifier's supplement prints for a data set."""
    rows = table_rows(published_table(TABLE, published_index()))
    values = (row.value for row in rows if row.metric == METRIC and row.dataset == dataset)
    return next((float(value) for value in values if value is not None), None)


def _place(name: str, data_dir: Path | None) -> tuple[str, Path | None, Path | None]:
    """Arguments of `load_dataset`; `UserError` for what is no data set."""
    if is_data_folder(name):
        return read_folder_card(Path(name))[0].name, data_dir, Path(name)
    step = "--intrinsic-dimension takes one by name or its folder"
    find = partial(known_name, "data set", known=dataset_names(), next_step=step)
    return resolve_option("show", name, find), data_dir, None
