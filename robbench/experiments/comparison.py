"""Comparison of published with measured numbers: for every row a verdict, and the differences of the settings.

within, outside: the known settings are equal; within means that the measured 95 % interval, widened by the rounding of
the print, contains the published number. Clean accuracy of a loadable model on the whole published test set is
deterministic: it may differ by 0.05 points. Numbers without an interval (distances) may differ by 1 %.
differs: same data, model and budget, but another setting (steps, training images, epochs, parameters of the training):
the numbers are shown without a verdict.
not comparable: measured on another data set, under another budget or of another model; the number is not shown, and
`reason` states the difference.
not run: nothing comparable was measured; `reason` states what robbench lacks ("needs DMAT") or that no run has it.

An interval covers the draw of test images, not that of trainings: papers print single trainings, and so do runs.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from robbench.cards import Training
from robbench.core.numerals import number
from robbench.experiments.arithmetic import arithmetic
from robbench.experiments.published import PublishedRow
from robbench.experiments.verdicts import (
    FIXED,
    Difference,
    Setting,
    Verdict,
    difference,
    in_interval,
    sentence,
    widening,
)
from robbench.metrics.likelihood import WEIGHTED, estimate_of
from robbench.results.rows import AVERAGE, CLEAN, TableRow
from robbench.results.tables import rows_under_attack
from robbench.specs import ResolvedAttack
from robbench.store.records import Run

# The verdicts of a comparison, in the order of pages.
VERDICTS: tuple[Verdict, ...] = ("within", "outside", "differs", "not comparable", "not run")
RELATIVE = 0.01
DIGITS = 12  # of a sha256
COMPARABLE = (
    "accuracy",
    "average_accuracy",
    "bits_per_dim",
    "corruption_accuracy",
    "fid",
    "importance_weighted_bits_per_dim",
    "l2_all",
    "linf_all",
)
OF_EVERY_IMAGE = ("accuracy", "accuracy_drop", "fid")
WITHOUT_MODEL = ("fid", "l2_all", "linf_all")
RANDOM = "r-la"  # perturbs every image, misclassified ones too
LIKELIHOOD = "nll-in"  # attack whose budget 0 means clean images in tables of bits/dim

# Display names of missing attacks, defenses and data sets, in "needs NAME".
CALLED = {
    "dmat": "DMAT",
    "dmat-jsa": "DMAT",
    "jsa-gan-at": "JSA with a GAN",
    "jsa-at-mixup": "mixup of JSA images",
    "vae-gan": "VAE-GAN",
    "fast-pat": "Fast PAT",
    "advprop": "AdvProp",
    "rlat": "RLAT",
    "er-classifier": "ER-Classifier",
    "er1-detector": "ER-Detector",
    "er2-detector": "ER-Detector",
    "kd-detector": "KD detector",
    "lid-detector": "LID detector",
    "not-stated": "the paper to say whether the images were perturbed",
    "corruptions": "CIFAR-10-C",
    "samples": "GAN samples",
    "cw": "C&W",
    "multi-step-la": "multi-step latent training",
}


@dataclass(frozen=True)
class Known:
    """Names that robbench has; a row "needs" all others. weights: first digits of the sha256 of the zoo's models, by
    name, so that another network of the same name is not taken for the published one."""

    attacks: Collection[str]
    defenses: Collection[str]
    datasets: Collection[str]
    weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """A row of a run's leaderboard with its setting, as far as cards and cells state it.

    Attributes:
        row: the number.
        run: name of the run's folder.
        attack: without options ("pgd20" of "pgd20@0.1").
        architecture: of the card; "" without one.
        train_samples, epochs: of the training; None where the card does not state them.
        steps, step_size: of the attack; None where it has none.
        held_out: number of training images kept for validation.
        draws: importance samples of bits/dim; None for any other number.
        trained: parameters of defense and recipe on the card, and the flow's name under "flow".
        weights: first digits of their sha256.
        every_image: whether misclassified images were perturbed too, as papers do with R-LA.
    """

    row: TableRow
    run: str
    attack: str
    architecture: str
    train_samples: int | None = None
    epochs: int | None = None
    steps: int | None = None
    step_size: float | None = None
    held_out: int = 0
    draws: int | None = None
    trained: Mapping[str, object] = field(default_factory=dict)
    weights: str = ""
    every_image: bool = False


@dataclass(frozen=True)
class Comparison:
    """A published number and its measurement.

    Attributes:
        published: the printed number.
        recomputed: its correct value where the printed one contradicts its own table, to compare with; else None.
        measured: None where nothing comparable was measured.
        verdict: of the comparison.
        reason: of the verdict.
        differences: between the settings.
    """

    published: PublishedRow
    recomputed: float | None
    measured: Measured | None
    verdict: Verdict
    reason: str
    differences: tuple[Difference, ...] = ()

    @property
    def reference(self) -> float | None:
        """The number to compare with."""
        if self.recomputed is not None:
            return self.recomputed
        return None if self.published.value is None else float(self.published.value)

    @property
    def difference(self) -> float | None:
        """Measured minus published, None when one of them is missing."""
        if self.measured is None or self.measured.row.value is None or self.reference is None:
            return None
        return self.measured.row.value - self.reference

    @property
    def setting(self) -> str:
        """The differences between the settings as text; empty without known ones."""
        return sentence(self.differences)


def measured_rows(run: Run) -> list[Measured]:
    """The leaderboard of a run, by accuracy under attack, with the settings of its cards and cells."""
    cells = {(r.cell.model_name, r.cell.attack.label): r.cell.attack for r in run.cells}
    rows = []
    for row in rows_under_attack(run):
        card, attack = run.cards.get(row.model), cells.get((row.model, row.attack))
        training = card.training if card else None
        steps = attack.parameters.get("steps") if attack else None
        measured = Measured(
            row=row,
            run=run.folder.name,
            attack=row.attack.partition("@")[0],
            architecture=card.architecture.name if card else "",
            steps=int(steps) if steps is not None else None,
            step_size=_step_size(attack) if attack else None,
            draws=_draws(row, attack),
            weights=card.weights.sha256[:DIGITS] if card else "",
            every_image=attack is not None and attack.semantics == "perturbation",
        )
        rows.append(measured if training is None else _with_training(measured, training))
    of_noise = {place for place, attack in cells.items() if attack.parameters.get("images") == "noise"}
    return [*rows, *_list_unattacked([m for m in rows if (m.row.model, m.row.attack) not in of_noise])]


def _step_size(attack: ResolvedAttack) -> float | None:
    """Absolute step size, for latent attacks in the latent space; None for an attack without one."""
    absolute, relative = (attack.parameters.get(key) for key in ("step_size", "relative_step_size"))
    radius = attack.eta if attack.epsilon is None else attack.epsilon
    if absolute is not None:
        return float(absolute)
    return None if relative is None or radius is None else float(relative) * radius


def _with_training(measured: Measured, training: Training) -> Measured:
    parts = [training.parameters.get(part) for part in ("recipe", "defense")]
    trained = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}
    return replace(
        measured,
        train_samples=training.train_samples,
        epochs=training.epochs,
        held_out=training.validation_samples,
        trained=trained | ({"flow": training.flow.name} if training.flow else {}),
    )


def _draws(row: TableRow, attack: ResolvedAttack | None) -> int | None:
    """Draws of an importance-weighted number."""
    weighted = attack is not None and row.metric.startswith(WEIGHTED)
    return estimate_of(attack)[1] if attack is not None and weighted else None


def _list_unattacked(rows: Sequence[Measured]) -> Iterator[Measured]:
    """Bits/dim of unattacked test images, once per flow, estimate and run: as budget 0 of `LIKELIHOOD`, or where they
    are importance-weighted as those of clean images."""
    seen = set()
    for m in rows:
        metric, key = m.row.metric.removesuffix("_before"), (m.row.model, m.row.metric, m.draws)
        of_flow = metric != m.row.metric and metric.endswith("bits_per_dim") and m.row.model == m.row.flow
        if not of_flow or key in seen:
            continue
        seen.add(key)
        weighted = metric.startswith(WEIGHTED)
        attack, epsilon = (CLEAN, None) if weighted else (LIKELIHOOD, 0.0)
        row = replace(m.row, metric=metric, attack=attack, epsilon=epsilon)
        yield replace(m, row=row, attack=attack, steps=None)


def compare(
    published: Sequence[PublishedRow], measured: Sequence[Measured], known: Known
) -> list[Comparison]:
    """One comparison per published number of a table, in its order; recomputed numbers belong to their printed ones.

    measured: rows of one or more runs. Of several that fit, the one with the fewest differences is chosen, then the one
    with the most test images, then the first.
    """
    wrong = {id(found.row): found.recomputed for found in arithmetic(published) if not found.agrees}
    printed = [row for row in published if row.origin != "recomputed"]
    of: dict[tuple[str, str], list[Measured]] = {}
    for m in measured:
        of.setdefault((m.attack, m.row.metric), []).append(m)
    return [_compare_row(row, wrong.get(id(row)), of.get(_quantity(row), []), known) for row in printed]


def _quantity(row: PublishedRow) -> tuple[str, str]:
    """(attack, metric) of a published row, as `Measured` names them."""
    return row.attack.partition("@")[0], row.metric


def _compare_row(
    row: PublishedRow, recomputed: float | None, measured: Sequence[Measured], known: Known
) -> Comparison:
    lacking = _find_missing(row, known)
    found = [m for m in measured if _fits(row, m)]
    # A partial average that fits is over the attacks of the printed one; further attacks of the run do not matter.
    done = [m for m in found if m.row.measured and m.row.value is not None]
    if row.value is None or row.metric not in COMPARABLE or (lacking and not done):
        return Comparison(row, recomputed, None, "not run", lacking or "nothing that a run measures")
    if not done:
        why = f"{found[0].row.status}: {found[0].row.note}" if found else "no run has it"
        return Comparison(row, recomputed, None, "not run", why.removesuffix(": "))
    best = min(done, key=lambda m: _distance(row, m, known))
    differences = tuple(found for found in _list_differences(row, best, known) if found is not None)
    if apart := [d for d in differences if d.effect == "not comparable"]:
        reason = f"{best.row.model} ({best.run}): {sentence(apart)}"
        return Comparison(row, recomputed, None, "not comparable", reason, differences)
    blank = Comparison(row, recomputed, best, "differs", "another setting", differences)
    if any(found.effect == "no verdict" for found in differences):
        return blank
    verdict, reason = _judge(blank)
    return replace(blank, verdict=verdict, reason=reason)


def _find_missing(row: PublishedRow, known: Known) -> str:
    """ "needs DMAT" where robbench lacks something; else ""."""
    missing = [
        CALLED.get(name, name)
        for name, names in (
            (row.defense if not row.model else "", known.defenses),
            (row.attack.partition("@")[0], {*known.attacks, CLEAN, AVERAGE}),
        )
        if name and name not in names
    ]
    if row.dataset and row.dataset not in known.datasets:
        missing.append(f"data set {row.dataset}")
    return f"needs {', '.join(missing)}" if missing else ""


def _fits(row: PublishedRow, m: Measured) -> bool:
    """Whether `m` is the published quantity for that model, or for a model trained the same way."""
    who = row.model == m.row.model if row.model else _same_defense(row, m)
    same = who and _quantity(row) == (m.attack, m.row.metric)
    if row.attack == AVERAGE:
        return same and set(row.combines) == set(m.row.combined)
    return same and (row.epsilon == 0) == (m.row.epsilon == 0)  # budget 0 is no attack, not a smaller budget


def _same_defense(row: PublishedRow, m: Measured) -> bool:
    """Whether the defenses agree, or do not matter: distances of R-LA do not depend on the classifier."""
    return row.defense == m.row.defense or (not row.defense and row.metric in WITHOUT_MODEL)


def _distance(row: PublishedRow, m: Measured, known: Known) -> tuple[float, ...]:
    """Sort key: distance of a measurement from the published setting, then more images first."""
    found = _list_differences(row, m, known)
    apart = [d is not None and d.effect == "not comparable" for d in found]
    decides = [d is not None and d.effect != "named" for d in found]
    return (any(apart), *decides, -m.row.n)


def _list_differences(row: PublishedRow, m: Measured, known: Known) -> list[Difference | None]:
    """One entry per part of the setting, most important first; None where both agree or the print does not state it."""
    r = m.row
    weights = known.weights.get(row.model) if row.model and m.weights else None
    apart = Setting(r.dataset, m.architecture, r.epsilon, r.eta).apart_from(row)
    apart.insert(1, difference("weights", weights, m.weights, "not comparable"))
    pairs: list[tuple[str, object, object]] = []
    if row.defense and not row.model:
        pairs += [("epochs", row.epochs, m.epochs)]
        trained = _parameters(row.defense_parameters)
        pairs += [(f"training {key}", value, m.trained.get(key)) for key, value in trained.items()]
    pairs += [("steps", row.steps, m.steps)]
    pairs += [("importance samples", _parameters(row.attack_parameters).get("importance_samples"), m.draws)]
    pairs += [("step size", _parameters(row.attack_parameters).get("step_size"), m.step_size)]
    drawn = None if row.n == r.n else Difference("seed", "not stated", str(r.seed), "named")
    if row.attack.startswith(RANDOM) and row.metric in OF_EVERY_IMAGE:
        pairs += [("misclassified images", "perturbed", "perturbed" if m.every_image else "left as they are")]
    images = None if row.model else _training_images(row, m)
    sizes = difference("n", row.n, r.n, "named")
    return [*apart, *(difference(*pair) for pair in pairs), images, sizes, drawn]


def _training_images(row: PublishedRow, m: Measured) -> Difference | None:
    """Difference in training images: another setting, unless only robbench's validation split is left out, which is
    named."""
    found = difference("training images", row.train_samples, m.train_samples)
    if found is None or m.train_samples is None or m.train_samples + m.held_out != row.train_samples:
        return found
    text = f"{m.train_samples:,} ({m.held_out:,} more held out for validation)"
    return replace(found, measured=text, effect="named")


def _parameters(text: str) -> dict[str, object]:
    """ "key=value; key=value": fractions as numbers, "none" as an empty list, "crop-4+flip" as a list."""
    pairs = (part.partition("=") for part in text.split("; ") if part)
    return {key: _parse_value(value) for key, _, value in pairs}


def _parse_value(text: str) -> object:
    if text == "none":
        return []
    if "+" in text:
        return text.split("+")
    found = number(text)
    return text if found is None else found


def _judge(comparison: Comparison) -> tuple[Verdict, str]:
    row, m = comparison.published, comparison.measured
    if m is None or m.row.value is None or comparison.reference is None:
        raise ValueError("nothing to judge")
    reference, off = comparison.reference, abs(m.row.value - comparison.reference)
    if row.model and row.attack == CLEAN and row.unit == "%" and row.n == m.row.n:
        return ("within" if off <= FIXED + 1e-9 else "outside"), f"whole test set: {FIXED} points"
    if m.row.lower is None or m.row.upper is None:
        close = off <= RELATIVE * abs(reference) + widening(row) + 1e-9
        return ("within" if close else "outside"), f"no interval: {RELATIVE:.0%}"
    return in_interval(reference, m.row.lower, m.row.upper, widening(row)), "95 % interval"
