"""Schema of experiments, `experiments/NAME.yaml`: the papers' tables as files for `robbench run --experiment NAME`.

No torch here: listing experiments stays fast.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from robbench.core.errors import UserError, unknown_name
from robbench.core.numerals import number
from robbench.core.resources import data_root
from robbench.core.schema import Strict, load_yaml
from robbench.recipes import Recipe
from robbench.specs import Name

METRICS = (
    "accuracy",
    "accuracy_drop",
    "average_accuracy",
    "test_loss",
    "corruption_accuracy",
    "l2_all",
    "linf_all",
    "fid",
    "bits_per_dim",
    "importance_weighted_bits_per_dim",
)
# Of a training's settings or its images, read without training it.
SETTINGS = (
    "adv_training_epsilon",
    "adv_training_iterations",
    "data_dim",
    "estimated_intrinsic_dim",
    "embedding_dim",
)
DETECTION = ("acc_nadv", "acc_com")  # of a detector
WITHOUT_ATTACK = ("accuracy", "average_accuracy", "test_loss", "corruption_accuracy", *SETTINGS)
LEAST_TRAINING, LEAST_TEST = 16, 8  # least number of images at any scale


def _number(value: object) -> object:
    """Budgets may be fractions, as papers print them: 8/255."""
    found = number(value) if isinstance(value, str) else value
    if found is None:
        raise ValueError("a budget is a number or a fraction such as 8/255")
    return found


Budget = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]


class AttackUse(Strict):
    """A named attack with the experiment's changes.

    Attributes:
        name: of the attack.
        epsilon, eta: budgets, also as fractions; None for the attack's own.
        steps: number of steps; None for the attack's own.
        parameters: of the algorithm.
    """

    name: str
    epsilon: Budget | None = None
    eta: Budget | None = None
    steps: int | None = Field(default=None, gt=0)
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class TrainedModel(Strict):
    """A model that is trained if missing, as by `robbench train`.

    Attributes:
        defense: training objective.
        recipe, architecture: training schedule and network; None means the data set's default.
        flow: another model of the experiment, or one of the zoo.
        dataset: None means the experiment's.
        train_samples: size of the subset of training images; None for all.
        seeds: one model each.
        settings: as in `robbench train --set`.
    """

    defense: str
    recipe: str | None = None
    architecture: str | None = None
    flow: str | None = None
    dataset: str | None = None
    train_samples: int | None = Field(default=None, gt=0)
    seeds: tuple[int, ...] = (0,)
    settings: dict[str, Any] = Field(default_factory=dict)


class TrainedDetector(Strict):
    """A detector that is trained if missing, as by `robbench train --detector`, one for every seed of its model.

    Attributes:
        detector: its kind.
        model: the classifier that it guards, one of the experiment's.
        attacks: names of those that train it.
        layers: of the classifier; () for the detector's default ones.
        settings: as in `robbench train --set`.
    """

    detector: str
    model: str
    attacks: Annotated[tuple[str, ...], Field(min_length=1)]
    layers: tuple[str, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)


class Row(Strict):
    """A line of the table. Exactly one of model, difference and needs is given.

    Attributes:
        title: as in the published table.
        model: a model or detector of the experiment, or one per column by the column's title.
        difference: two models, first minus second.
        attack: of columns that name none.
        needs: what robbench lacks.
    """

    title: str
    model: str | dict[str, str] | None = None
    difference: tuple[str, str] | None = None
    attack: AttackUse | None = None
    needs: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum([self.model is not None, self.difference is not None, bool(self.needs)]) != 1:
            raise ValueError("give one of model, difference and needs")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all its models."""
        if self.difference:
            return self.difference
        return (
            tuple(self.model.values())
            if isinstance(self.model, dict)
            else (self.model,)
            if self.model
            else ()
        )

    def model_of(self, column: str) -> str | None:
        """The model of one column."""
        return self.model.get(column) if isinstance(self.model, dict) else self.model


class Column(Strict):
    """A column of the table. title: as in the published one. metric: one of `METRICS`, `DETECTION` and `SETTINGS`, on
    clean images where no attack is named. needs: as in `Row`; the metric may then be an unknown one.

    "average_accuracy" is the unweighted mean of all other columns, clean accuracy included. "accuracy_drop": relative,
    100 (1 - attacked / clean). "test_loss": mean cross-entropy of clean images. "l2_all", "linf_all": mean sizes.
    """

    title: str
    metric: str
    attack: AttackUse | None = None
    needs: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = (*METRICS, *DETECTION, *SETTINGS)
        if self.metric not in known and not self.needs:
            raise ValueError(
                f"metric {self.metric!r} is none of {', '.join(known)}; correct it, or say what it needs"
            )
        return self


class Experiment(Strict):
    """experiments/NAME.yaml.

    Attributes:
        name, title, source: its names, and where it is printed.
        published: the table to compare with (`robbench list published`); None where no numbers are printed.
        dataset: of attacks, and by default of trainings.
        flow: of latent attacks and bits/dim, a model of the experiment or of the zoo.
        likelihood_dtype: precision of scores of attacks on flows; None for the default.
        doubts: open questions and errors of the paper, and how they are resolved here; printed with the table.
        differences: from the paper's experiment; printed with the table.
        models, detectors: by name, trained if missing.
        rows, columns: of the table.
    """

    name: Name
    title: str
    source: str
    published: str | None
    dataset: str
    flow: str | None = None
    likelihood_dtype: Literal["float32", "float64"] | None = None
    doubts: Annotated[tuple[str, ...], Field(min_length=1)]
    differences: tuple[str, ...] = ()
    models: dict[Name, TrainedModel] = Field(default_factory=dict)
    detectors: dict[Name, TrainedDetector] = Field(default_factory=dict)
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    columns: Annotated[tuple[Column, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_known(self) -> Self:
        used = {name for row in self.rows for name in row.models}
        if unknown := sorted(used - set(self.models) - set(self.detectors)):
            raise ValueError(f"rows name models that `models` lacks: {', '.join(unknown)}")
        guarded = {detector.model for detector in self.detectors.values()}
        if unknown := sorted(guarded - set(self.models)):
            raise ValueError(f"detectors name models that `models` lacks: {', '.join(unknown)}")
        if twice := sorted(set(self.models) & set(self.detectors)):
            raise ValueError(f"a model and a detector are both called {twice[0]!r}")
        for row, column in self.runnable:
            if column.metric not in WITHOUT_ATTACK and not self.attack_of(row, column):
                raise ValueError(f"{column.metric!r} of row {row.title!r} is of an attack; name one")
            if column.metric in DETECTION and row.model_of(column.title) not in self.detectors:
                raise ValueError(
                    f"{column.metric!r} of row {row.title!r} is of a detector; name one of `detectors`"
                )
            if column.metric in SETTINGS and row.model_of(column.title) not in self.models:
                raise ValueError(f"{column.metric!r} of row {row.title!r} is of a model, not of a detector")
        for kind, titles in (
            ("rows", [r.title for r in self.rows]),
            ("columns", [c.title for c in self.columns]),
        ):
            if twice := sorted({title for title in titles if titles.count(title) > 1}):
                raise ValueError(f"{kind} share the title {twice[0]!r}")
        return self

    def attack_of(self, row: Row, column: Column) -> AttackUse | None:
        """The attack of a cell; None for clean images."""
        if column.metric in ("average_accuracy", "test_loss", *SETTINGS):
            return None
        return column.attack or row.attack

    @property
    def runnable(self) -> tuple[tuple[Row, Column], ...]:
        """Cells that robbench can compute, without averages and differences."""
        pairs = product(self.rows, self.columns)
        return tuple(
            (row, column) for row, column in pairs if row.model_of(column.title) and not column.needs
        )

    @property
    def needed_models(self) -> tuple[str, ...]:
        """Models of rows and detectors, and flows of these models and of attacks, each after the flow it needs."""
        return self.with_flows([name for row in self.rows for name in row.models])

    def with_flows(self, named: Sequence[str]) -> tuple[str, ...]:
        """The models `named`, the experiment's flow and the flows they use, each after the flow it needs."""
        order: dict[str, None] = {}

        def add(name: str | None) -> None:
            name = self.detectors[name].model if name in self.detectors else name
            if name in self.models and name not in order:
                add(self.models[name].flow)
                order[name] = None

        for name in (self.flow, *named) if named else ():
            add(name)
        return tuple(order)


def experiments() -> dict[str, Experiment]:
    """Every shipped experiment by name, in the order of tables."""
    found = (load_yaml(path, Experiment) for path in sorted(_folder().glob("*.yaml"), key=_sort_key))
    return {experiment.name: experiment for experiment in found}


def find_experiment(name: str) -> Experiment:
    """The experiment called `name`, or the YAML file of that path; `UserError` when there is none."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return load_yaml(Path(name), Experiment)
    if name not in experiment_names():
        raise unknown_name(
            "experiment", name, experiment_names(), "or give the path of an experiment's YAML file"
        )
    return load_yaml(_folder() / f"{name}.yaml", Experiment)


def experiment_names() -> list[str]:
    """Names of the shipped experiments, in the order of tables."""
    return [path.stem for path in sorted(_folder().glob("*.yaml"), key=_sort_key)]


def experiment_text(name: str) -> str:
    """The file of a shipped experiment."""
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def _folder() -> Path:
    return data_root() / "experiments"


def _sort_key(path: Path) -> tuple[str, int]:
    """Sort key of table files, with table 2 before table 10."""
    stem = path.stem.rstrip("0123456789")
    return stem, int(path.stem[len(stem) :] or 0)


@dataclass(frozen=True)
class Scale:
    """Size of an experiment run relative to the experiment: 0 < factor <= 1."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise UserError(
                f"--scale {self.factor:g} is not in (0, 1]; give 1 for the experiment itself, 0.01 for a look at it"
            )

    @property
    def full(self) -> bool:
        """Whether this is the experiment itself."""
        return self.factor == 1

    @property
    def label(self) -> str:
        """ "scale 0.01"; empty for the experiment itself."""
        return "" if self.full else f"scale {self.factor:g}"

    @property
    def suffix(self) -> str:
        """ "-scale0.01" for names; empty for the experiment itself."""
        return "" if self.full else f"-scale{self.factor:g}"

    def count(self, full: int, least: int) -> int:
        """`full` times the factor, rounded, but at least `least` (or all, if fewer)."""
        return max(min(least, full), round(full * self.factor))

    def schedule(self, recipe: Recipe, full: int, samples: int) -> dict[str, Any]:
        """`recipe.KEY` settings that scale a schedule to fewer epochs and training images.

        full, samples: training images of the experiment and of the scaled training.
        """
        if self.full:
            return {}
        epochs = self.count(recipe.epochs, 1)
        of_epochs = epochs / recipe.epochs
        of_steps = of_epochs * samples / full
        changes: dict[str, Any] = {"epochs": epochs}
        if recipe.milestones and not recipe.milestones_are_fractions:
            changes["milestones"] = [milestone * of_epochs for milestone in recipe.milestones]
        if recipe.decay_every_steps:
            changes["decay_every_steps"] = max(1, round(recipe.decay_every_steps * of_steps))
        if recipe.warmup_samples:
            changes["warmup_samples"] = round(recipe.warmup_samples * of_steps)
        if recipe.budget_warmup_epochs:
            changes["budget_warmup_epochs"] = round(recipe.budget_warmup_epochs * of_epochs)
        return {f"recipe.{key}": value for key, value in changes.items()}

    def flow_size(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`architecture.KEY` settings of a smaller flow: steps, blocks and width times the root of the factor."""
        if self.full:
            return {}
        root, least = math.sqrt(self.factor), {"steps": 1, "blocks": 1, "width": 8}
        return {
            f"architecture.{key}": max(min(value, least[key]), math.ceil(value * root))
            for key, value in arguments.items()
            if key in least
        }
