"""Stored examples scored again with the verifier's model: fp32, at two batch sizes.

A stored example proves that a sample is broken, never that it is robust, which only `rerun` tests. Where rounding
decides, nothing is judged: a difference counts only if the logits differ by more than `NEAR_TIE`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.attacks import ATTACKS, Attack, Victim
from robbench.attacks.search.decision import margins
from robbench.attacks.search.decision import predictions as predicted
from robbench.attacks.trust.context import full_precision
from robbench.attacks.trust.preflight import RandomisedModelError, check_model
from robbench.bundle.findings import Finding, judge
from robbench.bundle.images import CleanImages, Stored, stored_examples
from robbench.compare.paired import RULES, largest_count
from robbench.compare.pairs import same
from robbench.core.errors import UserError
from robbench.core.schema import validate
from robbench.metrics.accuracy import NEAR_TIE
from robbench.models.flows.base import FrozenFlow
from robbench.models.loading import GOLDEN_TOLERANCE, LoadedFlow, LoadedModel
from robbench.statistics.likelihood import BitsEstimate, estimated_bits_per_dim
from robbench.store.records import CellRecord, CellResult, Run

_ALPHA = RULES["default"].alpha
VERDICTS, MARGINS, CLEAN, LIKELIHOOD = "verdicts", "margins", "clean", "likelihood"
EXCUSED = (
    0.05  # share of verdicts that rounding may flip; for a model with tiny logits all would be near ties
)
Mask = NDArray[np.bool_]
Draws = tuple[BitsEstimate, int]  # estimate of an image's bits/dim, and number of noise draws


@dataclass(frozen=True)
class Scored:
    """Logits [n,K] of the same images, once per batch size; labels [n]."""

    labels: Tensor
    logits: tuple[Tensor, ...]

    def near_ties(self, predictions: Tensor) -> int:
        """Number of samples whose verdict or stored prediction [n] rounding may decide at some batch size."""
        near = torch.zeros(len(self.labels), dtype=torch.bool)
        for logits in self.logits:
            other = predicted(logits) != predictions
            near |= (margins(logits, self.labels).abs() < NEAR_TIE) | (
                other & (_lead(logits, predictions) < NEAR_TIE)
            )
        return int(near.sum())

    def margins(self) -> list[Tensor]:
        """Margins [n] per batch size."""
        return [margins(logits, self.labels) for logits in self.logits]

    def cross_entropies(self) -> list[Tensor]:
        """Cross-entropies [n] in nats per batch size."""
        return [nn.functional.cross_entropy(each, self.labels, reduction="none") for each in self.logits]

    def tolerance(self) -> Tensor:
        """Tolerance of the margins, [n], as that of golden outputs."""
        return GOLDEN_TOLERANCE * torch.stack(self.logits).abs().amax((0, 2)).clamp(min=1.0)


def _lead(logits: Tensor, predictions: Tensor) -> Tensor:
    """Largest logit minus that of a prediction, [n]; infinite where there is no prediction."""
    lead = logits.amax(1) - logits.gather(1, predictions.clamp(min=0)[:, None]).squeeze(1)
    return torch.where((predictions >= 0) & logits.isfinite().all(1), lead, float("inf"))


def batch_sizes(n: int, largest: int) -> tuple[int, ...]:
    """Two batch sizes for n images where possible: as large as fits, and a third of that."""
    first = max(1, min(n, largest))
    return tuple(dict.fromkeys((first, max(1, first // 3))))


def classifier_findings(
    run: Run,
    model: LoadedModel,
    results: Sequence[CellResult],
    source: CleanImages,
    device: torch.device,
    batch_size: int,
) -> Iterator[Finding]:
    """Findings on the clean verdicts of all samples with a known image, then per cell and check on stored examples.

    model: with the name of the bundle. results: its cells.
    """
    scorer = _Scorer(model.module, device, batch_size, len(run.class_names))
    with full_precision():
        yield from _clean_findings(scorer, results, source)
        for result in results:
            stored = stored_examples(run, result, source)
            if len(stored.rows):
                yield from _example_findings(scorer, result.cell, stored)
    yield from _without_examples(results, VERDICTS)


def _without_examples(results: Sequence[CellResult], check: str) -> Iterator[Finding]:
    """A finding on the cells of a model that store no example."""
    bare = [r.cell.attack.label for r in results if len(r.rows) and not r.rows["example"].notna().any()]
    if bare:
        reason = f"{len(bare)} of {len(results)} cells store no example ({', '.join(bare[:3])})"
        yield Finding(results[0].cell.model, "", check, "unchecked", 0, f"not re-scored: {reason}")


@dataclass(frozen=True)
class _Scorer:
    module: nn.Module
    device: torch.device
    batch_size: int
    classes: int

    def score(self, images: Tensor, labels: Tensor, draws: int = 1, attacked: bool = False) -> Scored:
        logits = []
        for size in batch_sizes(len(images), self.batch_size):
            victim = Victim(self.module, self.device, size)
            victim.draws = draws
            logits.append(victim.attacked_logits(images, labels) if attacked else victim.clean_logits(images))
            if logits[-1].shape[1] != self.classes:
                raise UserError(
                    f"it returns {logits[-1].shape[1]} logits, the bundle has {self.classes} classes"
                )
        return Scored(labels, tuple(logits))

    def is_randomised(self, images: Tensor) -> bool:
        """Whether logits of the same images differ between calls; `UserError` for anything else `check_model`
        refuses."""
        try:
            check_model(Victim(self.module, self.device, self.batch_size), images)
        except RandomisedModelError:
            return True
        return False


def _clean_findings(scorer: _Scorer, results: Sequence[CellResult], source: CleanImages) -> Iterator[Finding]:
    """Findings on clean predictions and margins of all rows; each sample is scored once for all cells."""
    rows = pd.concat([result.rows[["sample_id", "label"]] for result in results]).drop_duplicates("sample_id")
    rows = rows[source.has([int(i) for i in rows["sample_id"]])].sort_values("sample_id")
    name = results[0].cell.model
    if not len(rows):
        yield Finding(
            name, "", CLEAN, "unchecked", 0, "no clean image is at hand; name the data set's folder"
        )
        return
    ids, labels = rows["sample_id"].to_numpy(), torch.tensor(rows["label"].to_numpy(), dtype=torch.int64)
    images = source.of([int(i) for i in ids])
    randomised, scored = scorer.is_randomised(images), scorer.score(images, labels)
    problems, ties, excused = [], 0, 0
    for result in results:
        own = result.rows[result.rows["sample_id"].isin(ids)]
        part = _part(scored, np.searchsorted(ids, own["sample_id"].to_numpy()))
        if randomised:
            yield _randomised_finding(name, result.cell.attack.label, CLEAN, part, own, "clean_prediction")
            continue
        wrong, near = other_verdicts(part, own, "clean_prediction", "clean_margin")
        excused = max(excused, near)
        far = other_numbers(part, own, "clean_margin", part.margins())
        ties = max(ties, part.near_ties(_column(own, "clean_prediction")))
        problems += [
            f"{result.cell.attack.label}: {count_text(own, mask, what)}"
            for mask, what in ((wrong, "clean verdicts"), (far & ~wrong, "clean margins"))
            if mask.any()
        ]
    if randomised:
        return
    verdict = _judge_excused(judge(name, "", CLEAN, len(rows), problems, ties), excused)
    yield (
        verdict
        if verdict.verdict != "agrees" or not source.weaker
        else Finding(name, "", CLEAN, "weaker", len(rows), "against the bundle's own clean images", ties)
    )


def _judge_excused(finding: Finding, excused: int) -> Finding:
    """The finding, made "unchecked" where more verdicts differ as near ties than rounding explains."""
    if finding.verdict != "agrees" or excused <= max(1, EXCUSED * finding.count):
        return finding
    reason = (
        f"{excused} of {finding.count} verdicts are others where |margin| < {NEAR_TIE:g} here, which is more than "
        f"rounding turns: logits this small decide nothing"
    )
    return replace(finding, verdict="unchecked", reason=reason)


def _randomised_finding(
    name: str, label: str, check: str, scored: Scored, rows: pd.DataFrame, prediction: str, near: int = 0
) -> Finding:
    """The finding on verdicts of a randomised model: "weaker", or "unchecked" where far more of them differ than
    between two scorings here."""
    predictions, first, last = _column(rows, prediction), scored.logits[0], scored.logits[-1]
    wrong = int((predicted(first) != predictions).sum())
    own = int((predicted(first) != predicted(last)).sum())
    usual = largest_count(len(rows), min(1.0, 2 * (own + 1) / len(rows)), _ALPHA)
    reason = f"{wrong} of {len(rows)} verdicts were others this time: the model is randomised"
    return Finding(name, label, check, "weaker" if wrong <= usual else "unchecked", len(rows), reason, near)


def _part(scored: Scored, places: NDArray[np.intp]) -> Scored:
    return Scored(scored.labels[places], tuple(logits[places] for logits in scored.logits))


def _example_findings(scorer: _Scorer, cell: CellRecord, stored: Stored) -> Iterator[Finding]:
    name, label, rows = cell.model, cell.attack.label, stored.rows
    draws = verdict_forwards(cell)
    scored = scorer.score(stored.adversarial, stored.labels, draws, attacked=True)
    near = scored.near_ties(_column(rows, "prediction"))
    wrong, excused = other_verdicts(scored, rows, "prediction", "margin")
    if draws > 1 and scorer.is_randomised(stored.clean):
        yield _randomised_finding(name, label, VERDICTS, scored, rows, "prediction", near)
        return
    problems = [count_text(rows, wrong, "verdicts")] if wrong.any() else []
    verdict = judge(name, label, VERDICTS, len(rows), problems, near)
    yield _judge_excused(verdict, excused)
    far = other_numbers(scored, rows, "margin", scored.margins())
    entropy = other_numbers(scored, rows, "cross_entropy", scored.cross_entropies())
    problems = [
        count_text(rows, mask, what)
        for mask, what in ((far, "margins"), (entropy & ~far, "cross-entropies"))
        if mask.any()
    ]
    yield judge(name, label, MARGINS, len(rows), problems)


def verdict_forwards(cell: CellRecord) -> int:
    """Forwards averaged per verdict of the cell's attack; 1 except for attacks on randomised models."""
    found = ATTACKS.get(cell.attack.algorithm)
    if not issubclass(found, Attack):
        return 1
    attack = object.__new__(found)  # without its flow or files, which are not needed and may be missing
    attack.parameters = validate(cell.attack.parameters, found.Parameters, f"attack {cell.attack.name!r}")
    return attack.verdict_forwards


def other_verdicts(scored: Scored, rows: pd.DataFrame, prediction: str, margin: str) -> tuple[Mask, int]:
    """Rows whose prediction, or sign of the margin, differs at some batch size by more than a near tie, and the number
    of those that differ by a near tie only."""
    predictions, right = _column(rows, prediction), torch.tensor(rows[margin].to_numpy() > 0)
    wrong = other = torch.zeros(len(rows), dtype=torch.bool)
    for logits, own in zip(scored.logits, scored.margins(), strict=True):
        changed, flipped = predicted(logits) != predictions, (own > 0) != right
        other = other | changed | flipped
        wrong = wrong | (changed & (_lead(logits, predictions) >= NEAR_TIE))
        wrong = wrong | (flipped & (own.abs() >= NEAR_TIE))
    return np.asarray(wrong.numpy(), dtype=np.bool_), int((other & ~wrong).sum())


def other_numbers(scored: Scored, rows: pd.DataFrame, column: str, measured: Iterable[Tensor]) -> Mask:
    """Rows whose number in `column` differs at some batch size by more than rounding. measured: [n] per batch size."""
    said = torch.tensor(rows[column].to_numpy(dtype=np.float64))
    wrong = torch.zeros(len(rows), dtype=torch.bool)
    for own in measured:
        wrong |= ~((own == said) | ((own.double() - said).abs() <= scored.tolerance()))
    return np.asarray(wrong.numpy(), dtype=np.bool_)


def _column(rows: pd.DataFrame, name: str) -> Tensor:
    return torch.tensor(rows[name].to_numpy(), dtype=torch.int64)


def count_text(rows: pd.DataFrame, mask: Mask, what: str) -> str:
    first = int(rows["sample_id"].to_numpy()[mask][0])
    return f"{int(mask.sum())} of {len(rows)} {what} are others (first sample {first})"


def classifier_likelihood(
    run: Run, result: CellResult, source: CleanImages, flow: FrozenFlow | None, batch_size: int
) -> Iterator[Finding]:
    """The finding on bits/dim of stored examples of a classifier's cell and of their clean images under the run's
    flow."""
    cell, stored = result.cell, stored_examples(run, result, source)
    if cell.nll_flow is None or not len(stored.rows):
        return
    if flow is None:
        reason = f"flow {cell.nll_flow.name} is not at hand; name it with --model CARD"
        yield Finding(cell.model, cell.attack.label, LIKELIHOOD, "unchecked", 0, reason)
        return
    yield _likelihood(run, cell, stored, flow, ("mean", 1), batch_size)


def flow_findings(
    run: Run, model: LoadedFlow, results: Sequence[CellResult], source: CleanImages, batch_size: int
) -> Iterator[Finding]:
    """Findings on bits/dim of stored examples of attacks on a flow, and of the attacked images. model: its judge has
    the precision of the cells."""
    for result in results:
        stored = stored_examples(run, result, source)
        if len(stored.rows):
            yield _likelihood(run, result.cell, stored, model.judge, _draws(result.cell), batch_size)
    yield from _without_examples(results, LIKELIHOOD)


def _draws(cell: CellRecord) -> Draws:
    """Estimate and number of draws of an attack on a flow, from its parameters."""
    parameters = cell.attack.parameters
    estimate: BitsEstimate = "importance" if parameters.get("estimate") == "importance" else "mean"
    return estimate, int(parameters.get("noise_draws", 1))


def _likelihood(
    run: Run, cell: CellRecord, stored: Stored, flow: FrozenFlow, draws: Draws, batch_size: int
) -> Finding:
    problems = []
    for column, images in (("nll_before", stored.clean), ("nll_after", stored.adversarial)):
        said = stored.rows[column].to_numpy(dtype=np.float64)
        wrong = np.zeros(len(said), dtype=np.bool_)
        for size in batch_sizes(len(images), batch_size):
            wrong |= ~same(said, _bits(run, flow, stored, images, draws, size))
        if wrong.any():
            problems.append(count_text(stored.rows, wrong, f"values of {column}"))
    return judge(cell.model, cell.attack.label, LIKELIHOOD, len(stored.rows), problems)


def _bits(
    run: Run, flow: FrozenFlow, stored: Stored, images: Tensor, draws: Draws, size: int
) -> NDArray[np.float64]:
    """Bits/dim [n] with the dequantisation noise of the run's seed."""
    device, ids, labels, parts = next(flow.buffers()).device, stored.ids, stored.labels, []
    with torch.no_grad(), full_precision():
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            bits = estimated_bits_per_dim(
                flow,
                images[part].to(device),
                labels[part].to(device),
                *draws,
                seed=run.seed,
                sample_ids=ids[part],
            )
            parts.append(bits.double().cpu())
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float64)
