"""Help of commands with many options: in groups, the common ones first."""

from collections.abc import Mapping, Sequence
from typing import Any

import click


class GroupedCommand(click.Command):
    """A command whose options stand in groups in its help; `groups`: names of options by heading. What no group names
    comes last."""

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The groups as sections."""
        records: dict[str, tuple[str, str]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                records[option.opts[-1].lstrip("-")] = record
        for heading, names in self.groups.items():
            rows = [records.pop(name) for name in names if name in records]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)
        with formatter.section("Other options"):
            formatter.write_dl(list(records.values()))


PLACES = ("zoo", "checkpoints", "threat-models", "data-dir", "data")
RUN = {
    "Common options": (
        *("attacks", "model", "defense", "dataset", "n", "epsilon", "out", "dry-run", "device", "config"),
    ),
    "Data": ("data", "data-dir", "like", "size", "seed"),
    "Models": ("weights", "zoo", "checkpoints"),
    "Attacks": ("eta", "steps", "target", "flow", "threat-models", "likelihood-dtype", "likelihood-draws"),
    "Computing": (
        *("batch-size", "threads", "compile", "backend", "ray-address", "gpus-per-cell"),
        *("resume", "keep-examples"),
    ),
    "Tables of papers": ("experiment", "scale", "fid-weights"),
}
TRAIN = {
    "Common options": ("defense", "dataset", "recipe", "architecture", "epochs", "seed", "out", "device"),
    "Further settings": ("set", "flow", "name", "train-samples", "threads"),
    "Detectors": ("detector", "model", "attacks", "layer", "n", "false-positive-rate"),
    "Places": PLACES,
}
BENCH = {
    "Common options": ("model", "attack", "n", "epsilon", "out", "device"),
    "Further settings": ("seeds", "batch-size", "threads"),
    "Places": PLACES,
}
VERIFY = {
    "Common options": (
        "out",
        "accept-versions",
        "model",
        "share",
        "data-dir",
        "data",
        "device",
        "files-only",
        "json",
    ),
    "Running again": ("rerun-samples", "seed", "flip-tolerance", "batch-size"),
    "Places": PLACES,
}
