"""Accuracy against one setting of the training: models of a group whose cards differ in it and the seed alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from robbench.cards import ModelCard
from robbench.core.schema import canonical_hash
from robbench.metrics.verdicts import clean_correct, shown_verdicts
from robbench.report.figures import as_file
from robbench.report.plots import Curve, CurveFigure, dress, legend, look, svg
from robbench.report.site.groups import Group
from robbench.results.rows import CLEAN, ModelResults, complete
from robbench.statistics.accuracy import Estimate, accuracy
from robbench.statistics.trainings import mean_over_trainings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("setting", "value", "attack", "epsilon", "trainings", "n", "accuracy", "lower", "upper")
FAMILY = 40  # values of a setting that are drawn
Point = tuple[float, float, float, float]
Line = tuple[str, str, str, float | None, int, int, float, float, float]


@dataclass(frozen=True)
class Family:
    """Models that differ in one setting of their training. values: names of the models by value of the setting, one a
    seed, values in order."""

    setting: str
    values: Mapping[object, tuple[str, ...]]


@dataclass(frozen=True)
class TrainingSweep:
    """Accuracy of a family.

    Attributes:
        title: of what.
        models: names of the family's.
        figure: the picture on a page.
        curves, axis: what is drawn, and against what.
        lines: of `COLUMNS`.
        note: on intervals.
    """

    title: str
    models: frozenset[str]
    figure: CurveFigure
    curves: tuple[Curve, ...]
    axis: str
    lines: tuple[Line, ...]
    note: str

    @property
    def file(self) -> str:
        """The picture as an SVG file, with the names of its curves."""
        return as_file(
            svg(
                _figure(self.curves, self.axis, named=True),
                "training",
                "curves",
                _alternative(self.title, self.curves),
            )
        )


def training_sweeps(group: Group, model: str) -> list[TrainingSweep]:
    """The sweeps that a model of the group is part of."""
    return [sweep for sweep in group.once(all_sweeps) if model in sweep.models]


def all_sweeps(group: Group) -> list[TrainingSweep]:
    """The sweeps of all models of a group."""
    found = (_sweep(group, family, k) for k, family in enumerate(families(group)))
    return [sweep for sweep in found if sweep is not None]


def families(group: Group) -> list[Family]:
    """Every family of at least two values among the classifiers of a group; the same weights count once."""
    found: dict[tuple[str, str], dict[object, dict[str, str]]] = {}
    for model in group.models:
        card = group.card(model.name) if model.kind == "classifier" else None
        settings = training_settings(card)
        hashes = {key: canonical_hash([key, value]) for key, value in settings.items()}
        for key, value in settings.items():
            others = canonical_hash(sorted(hashes[other] for other in settings if other != key))
            names = found.setdefault((key, others), {}).setdefault(value, {})
            names.setdefault(card.weights.sha256 if card else "", model.name)
    return [
        Family(key, {value: tuple(values[value].values()) for value in sorted(values, key=_order)})
        for (key, _), values in found.items()
        if 1 < len(values) <= FAMILY
    ]


def _order(value: object) -> tuple[bool, float, str]:
    number = _number(value)
    return number is None, number or 0.0, str(value)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def training_settings(card: ModelCard | None) -> dict[str, str | int | float | bool | None]:
    """What determines a model's weights beside its seed, plain values by name; empty without a training in the card.

    The step size of an inner attack counts as a part of its budget, from which it follows by default.
    """
    if card is None or card.training is None:
        return {}
    training, parameters = card.training, card.training.parameters
    inner, schedule = (
        dict(part) if isinstance(part := parameters.get(name), dict) else {} for name in ("defense", "recipe")
    )
    if _number(inner.get("epsilon")) and _number(inner.get("step_size")):
        inner["step_size"] = f"{inner['step_size'] / inner['epsilon']:.4g} epsilon"
    found: dict[str, object] = {
        "defense": card.defense,
        "architecture": card.architecture.name,
        "data set": card.dataset,
        "training images": training.train_samples,
        "flow": training.flow.sha256 if training.flow else None,
        **{f"{key} of the schedule": value for key, value in schedule.items()},
        **{f"{key} of the architecture": value for key, value in card.architecture.arguments.items()},
        **{f"{key} of the defense": value for key, value in inner.items()},
    }
    return {key: value if _is_plain(value) else repr(value) for key, value in found.items()}  # type: ignore[misc]


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _sweep(group: Group, family: Family, number: int) -> TrainingSweep | None:
    """None where the models have no finished attack in common, or no attack has two budgets to draw."""
    models = {model.name: model for model in group.models}
    lines = [
        line
        for value, names in family.values.items()
        for line in _lines(family.setting, value, [_estimates(group, models[name]) for name in names])
    ]
    numeric = all(_number(value) is not None for value in family.values)
    curves = _by_value(lines) if numeric else _by_budget(lines)
    if all(len(curve.points) < 2 for curve in curves):
        return None
    axis, key = family.setting if numeric else "epsilon", f"training-{number}"
    title = f"Accuracy against {family.setting}" + ("" if numeric else " and epsilon")
    drawn = svg(_figure(curves, axis), key, "curves", _alternative(title, curves))
    picture = CurveFigure(drawn, 0, legend(curves, key))
    named = frozenset(name for names in family.values.values() for name in names)
    return TrainingSweep(title, named, picture, tuple(curves), axis, tuple(lines), _note(lines))


def _estimates(group: Group, model: ModelResults) -> dict[str, tuple[float | None, Estimate]]:
    """Accuracy by label of the attack, with its epsilon; "clean" first."""
    done = complete(group.run, [*model.cells, *group.swept(model.name)])
    found = {CLEAN: (0.0, accuracy(clean_correct(done[0].rows)))} if done else {}
    return {
        **found,
        **{r.cell.attack.label: (r.cell.attack.epsilon, accuracy(shown_verdicts(r))) for r in done},
    }


def _lines(
    setting: str, value: object, trainings: Sequence[Mapping[str, tuple[float | None, Estimate]]]
) -> Iterable[Line]:
    """Means over trainings, of attacks that all of them have."""
    for label in trainings[0]:
        if not all(label in one for one in trainings):
            continue
        epsilon, first = trainings[0][label]
        mean, lower, upper = first.value, first.lower, first.upper
        if len(trainings) > 1:
            mean, lower, upper = mean_over_trainings([one[label][1].value for one in trainings])
        low, up = max(lower, 0.0), min(upper, 100.0)
        yield setting, str(value), label, epsilon, len(trainings), first.n, mean, low, up


def _by_value(lines: Sequence[Line]) -> list[Curve]:
    """A curve an attack, against the setting."""
    labels = dict.fromkeys(line[2] for line in lines)
    return [
        Curve(label, tuple((float(line[1]), *line[6:]) for line in lines if line[2] == label), k)
        for k, label in enumerate(labels)
    ]


def _by_budget(lines: Sequence[Line]) -> list[Curve]:
    """A curve a value of the setting and attack, against the attack's epsilon."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for _, value, label, epsilon, *_, mean, lower, upper in lines:
        if label != CLEAN and epsilon is not None:
            curves.setdefault((value, label.partition("@")[0]), []).append((epsilon, mean, lower, upper))
    clean = {line[1]: (0.0, *line[6:]) for line in lines if line[2] == CLEAN}
    return [
        Curve(f"{value}, {attack}", (clean[value], *sorted(points)), k)
        for k, ((value, attack), points) in enumerate(curves.items())
    ]


def _alternative(title: str, curves: Sequence[Curve]) -> str:
    """The figure's numbers in words."""
    return f"{title}, in percent. " + "; ".join(map(_words, curves))


def _words(curve: Curve) -> str:
    points = (f"{y:.1f} [{low:.1f}, {up:.1f}] at {x:g}" for x, y, low, up in curve.points)
    return f"{curve.name}: {', '.join(points)}"


def _note(lines: Sequence[Line]) -> str:
    counts = sorted({line[4] for line in lines})
    several = "Means over trainings with Student's 95 % interval over their seeds, within 0 and 100"
    single = "Wilson's 95 % interval over images"
    trainings = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    how = single if counts == [1] else several if counts[0] > 1 else f"{several}; of one training {single}"
    return f"Models that differ in nothing else but the seed. {how}. Trainings a point: {trainings}; n = {lines[0][5]}."


def _figure(curves: Sequence[Curve], axis: str, named: bool = False) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        x, mean, lower, upper = zip(*curve.points, strict=True)
        bars = [
            [m - low for m, low in zip(mean, lower, strict=True)],
            [u - m for m, u in zip(mean, upper, strict=True)],
        ]
        axes.errorbar(x, mean, yerr=bars, capsize=2.5, elinewidth=1, **look(curve.style))
    axes.set_ylim(-2, 102)
    dress(axes, axis, "accuracy (%)")
    if named:
        figure.legend([curve.name for curve in curves], loc="outside right upper", frameon=False)
    return figure
