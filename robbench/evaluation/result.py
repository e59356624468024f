"""What `evaluate` returns: accuracies with intervals, the samples behind them, and what to know of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from robbench.core.errors import UserError, printable
from robbench.evaluation.measuring import Measured
from robbench.metrics.verdicts import clean_correct, right_under_attack, robust
from robbench.report.templating import environment
from robbench.specs import Norm, Space
from robbench.statistics.accuracy import Estimate, Verdicts, accuracy

if TYPE_CHECKING:
    import pandas as pd

CLEAN, WORST_CASE = "clean", "worst-case"
COLUMNS = (
    "attack",
    "threat_model",
    "epsilon",
    "eta",
    "measure",
    "accuracy",
    "lower",
    "upper",
    "robust_accuracy",
    "n",
    "forwards",
    "backwards",
    "suspicions",
)
_HEADER = ("attack", "accuracy in %", "95 % interval", "n", "epsilon", "eta")
_TEMPLATE = """<table><caption>{{ caption }}</caption>
<tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for line in lines %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}"""


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """Accuracies of one model on clean images and under attacks, in percent with 95 % Wilson intervals.

    Attributes:
        model: name of the model.
        attacks: what was measured, attack by attack.
        notes: what was done to the data, taken of the model's output, or could not be checked, one line each.
        folder: the run folder; None where the run was kept in memory only.
    """

    model: str
    attacks: tuple[Measured, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.attacks[0].rows)

    @cached_property
    def clean(self) -> Estimate:
        """Accuracy without attack."""
        return accuracy(clean_correct(self.attacks[0].rows))

    @cached_property
    def accuracy(self) -> dict[str, Estimate]:
        """By label of an attack, what its measure says: robust accuracy (right on the clean image and under attack), or
        of perturbations accuracy under attack (right on the attacked image)."""
        return {one.spec.label: accuracy(_shown_verdicts(one)) for one in self.attacks}

    @cached_property
    def worst_case(self) -> Estimate | None:
        """Share of samples right without attack and under every attack but perturbations; None with these alone."""
        strict = [robust(one.rows) for one in self._strict]
        return accuracy(np.logical_and.reduce(strict)) if strict else None

    @property
    def suspicions(self) -> dict[str, tuple[str, ...]]:
        """By label of an attack, what speaks against its number, one line each; attacks without any are left out."""
        return {one.spec.label: one.suspicions for one in self.attacks if one.suspicions}

    @cached_property
    def samples(self) -> "pd.DataFrame":
        """A row per sample: `id` (its position in the data), `label`, `clean_prediction`, for every attack
        `prediction_ATTACK`, `distance_ATTACK` (of the attacked image from the clean one, in the attack's norm; linf for
        latent, joint and rendered attacks) and `robust_ATTACK`, and `robust`, under all attacks but perturbations."""
        import pandas as pd

        first = self.attacks[0].rows
        columns: dict[str, Any] = {
            "id": first["sample_id"],
            "label": first["label"],
            "clean_prediction": first["clean_prediction"],
        }
        for one in self.attacks:
            label = one.spec.label
            columns[f"prediction_{label}"] = one.rows["prediction"]
            columns[f"distance_{label}"] = one.rows[distance_norm(one.spec.space, one.spec.norm)]
            columns[f"robust_{label}"] = one.rows["robust"]
        columns["robust"] = np.logical_and.reduce(
            [clean_correct(first), *(robust(one.rows) for one in self._strict)]
        )
        return pd.DataFrame(columns)

    @property
    def adversarial(self) -> dict[str, Tensor]:
        """Adversarial images [N,C,H,W] in [0,1] by label of an attack, in the order of `samples`; `UserError` where
        they were not kept."""
        found = {one.spec.label: one.images for one in self.attacks if one.images is not None}
        if len(found) < len(self.attacks):
            again = (
                " and fresh=True, for the folder holds rows without them" if self.folder is not None else ""
            )
            raise UserError(
                f"the adversarial images were not kept; call robbench.evaluate(..., keep_images=True){again}"
            )
        return found

    def to_dataframe(self) -> "pd.DataFrame":
        """The table: a row "clean", one per attack, and "worst-case"; columns `COLUMNS`. accuracy, lower, upper and
        robust_accuracy in percent, NaN for a worst case of perturbations alone; forwards and backwards are sums over
        samples; suspicions "" for nothing."""
        import pandas as pd

        rows = [_attack_row(one) for one in self.attacks]
        clean = {
            "attack": CLEAN,
            "threat_model": CLEAN,
            "measure": "accuracy",
            **_estimate_columns(self.clean),
            "forwards": self.n,
            "backwards": 0,
            "suspicions": "",
        }
        worst: dict[str, object] = {
            "attack": WORST_CASE,
            "threat_model": "all",
            "measure": "robust accuracy",
            "n": self.n,
            "suspicions": "",
        }
        if self.worst_case is not None:
            worst |= {**_estimate_columns(self.worst_case), "robust_accuracy": self.worst_case.value}
        worst |= {key: sum(row[key] for row in rows) for key in ("forwards", "backwards")}
        return pd.DataFrame([clean, *rows, worst], columns=list(COLUMNS))

    @property
    def _strict(self) -> list[Measured]:
        return [one for one in self.attacks if one.spec.is_adversary]

    def _lines(self) -> list[tuple[str, ...]]:
        found = [_line(CLEAN, self.clean)]
        for one in self.attacks:
            found.append(_line(one.spec.label, self.accuracy[one.spec.label], one.spec.epsilon, one.spec.eta))
        return [*found, *([_line(WORST_CASE, self.worst_case)] if self.worst_case is not None else [])]

    def _remarks(self) -> list[str]:
        doubts = [f"{label}: {text}" for label, texts in self.suspicions.items() for text in texts]
        perturbed = [one.spec.label for one in self.attacks if one.spec.semantics == "perturbation"]
        measure = f"{', '.join(perturbed)}: accuracy under attack, no robust accuracy" if perturbed else ""
        return [*filter(None, [measure]), *self.notes, *doubts]

    def __str__(self) -> str:
        lines = [_HEADER, *self._lines()]
        widths = [max(len(line[k]) for line in lines) for k in range(len(_HEADER))]
        texts = [
            "  ".join([line[0].ljust(widths[0]), *(map(str.rjust, line[1:], widths[1:]))]).rstrip()
            for line in lines
        ]
        return "\n".join([self.model, *texts, *(f"* {printable(remark)}" for remark in self._remarks())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        template = environment().from_string(_TEMPLATE)
        return template.render(caption=self.model, header=_HEADER, lines=self._lines(), notes=self._remarks())


def distance_norm(space: Space, norm: Norm) -> Norm:
    """The norm in which the distance of an attacked image is told: the attack's own where it measures pixels, else linf
    (latent, joint and rendered attacks)."""
    return norm if space in ("image", "minimal") else "linf"


def result_warnings(attacks: Sequence[Measured]) -> list[str]:
    """Every suspicion once, with all attacks that share it."""
    shared: dict[str, list[str]] = {}
    for one in attacks:
        for text in one.suspicions:
            shared.setdefault(text, []).append(one.spec.label)
    return [f"{', '.join(labels)}: {text}" for text, labels in shared.items()]


def _shown_verdicts(one: Measured) -> Verdicts:
    return right_under_attack(one.rows) if one.spec.semantics == "perturbation" else robust(one.rows)


def _attack_row(one: Measured) -> dict[str, Any]:
    return {
        "attack": one.spec.label,
        "threat_model": one.spec.threat_model,
        "epsilon": one.spec.epsilon,
        "eta": one.spec.eta,
        "measure": one.spec.measure,
        **_estimate_columns(accuracy(_shown_verdicts(one))),
        "robust_accuracy": accuracy(robust(one.rows)).value,
        "forwards": int(one.rows["forwards"].sum()),
        "backwards": int(one.rows["backwards"].sum()),
        "suspicions": "; ".join(one.suspicions),
    }


def _estimate_columns(estimate: Estimate) -> dict[str, Any]:
    return {"accuracy": estimate.value, "lower": estimate.lower, "upper": estimate.upper, "n": estimate.n}


def _line(name: str, estimate: Estimate, *budgets: float | None) -> tuple[str, ...]:
    texts = ["" if budget is None else f"{budget:.4g}" for budget in (*budgets, None, None)[:2]]
    return (
        name,
        f"{estimate.value:.2f}",
        f"[{estimate.lower:.2f}, {estimate.upper:.2f}]",
        str(estimate.n),
        *texts,
    )
