"""Bits/dim of images: after attacks on a classifier, under the run's flow, and after attacks on a flow.

The mean over the finite samples with a normal 95 % interval, and the median over all samples, because adversarial
images reach 1e16 or overflow and a few of them may dominate a mean. Samples that are left out are counted. The bits/dim
of an image come from one draw of the dequantisation noise, from the mean over several, or are importance-weighted over
several, a different quantity with its own metrics.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np

from robbench.metrics.registry import Metric, Number, register
from robbench.metrics.verdicts import Floats, floats, is_broken
from robbench.specs import ResolvedAttack
from robbench.statistics.likelihood import BitsEstimate, BitsPerDim, bits_per_dim
from robbench.store.records import CellRecord, CellResult

BITS = "bits/dim"
ONE_DRAW = "one noise draw"
OUTLIER = 100  # times the median; samples beyond it are counted in a remark on the mean
WEIGHTED = "importance_weighted_"  # prefix of the names of metrics of the tighter bound
NLL_PART = "NLL after the attack, bits/dim"
When = Literal["before", "after"]


def estimate_of(attack: ResolvedAttack) -> tuple[BitsEstimate, int]:
    """How an attack on a flow scores images: the estimate and the number of noise draws."""
    draws = int(attack.parameters.get("noise_draws", 1))
    weighted = attack.parameters.get("estimate") == "importance" and draws > 1
    return ("importance" if weighted else "mean"), draws


def bits_metric(attack: ResolvedAttack) -> str:
    """ "bits_per_dim", or "importance_weighted_bits_per_dim"."""
    return f"{WEIGHTED if estimate_of(attack)[0] == 'importance' else ''}bits_per_dim"


def draws_text(attack: ResolvedAttack) -> str:
    """ "one noise draw", "mean of 4 noise draws", "importance-weighted over 8 noise draws"."""
    estimate, draws = estimate_of(attack)
    if draws == 1:
        return ONE_DRAW
    return f"{'mean of' if estimate == 'mean' else 'importance-weighted over'} {draws} noise draws"


def settings(cell: CellRecord, with_steps: bool = True) -> str:
    """Settings that a label does not show: "epsilon of 255; 32 steps; one noise draw", restarts, rounding,
    precision."""
    p = cell.attack.parameters
    parts = [f"epsilon of {cell.attack.pixel_range}"]
    parts += [f"{p['steps']} steps"] if with_steps and "steps" in p else []
    parts += [f"{p['restarts']} restarts"] if p.get("restarts", 1) > 1 else []
    parts += [draws_text(cell.attack)]
    parts += ["rounded to grey levels"] if p.get("quantize") else []
    return "; ".join([*parts, *(["scored in float64"] if cell.precision == "fp64" else [])])


def attacks_noise(attack: ResolvedAttack) -> bool:
    """Whether an attack on a flow starts from uniform-noise images instead of test images."""
    return attack.parameters.get("images") == "noise"


def images(cell: CellRecord) -> str:
    """The attacked images: "test images" or "uniform-noise images"."""
    return "uniform-noise images" if attacks_noise(cell.attack) else "test images"


def outliers_note(values: Floats, median: float | None) -> str:
    """A remark on finite `values` so far above the median that they dominate the mean; "" for none."""
    if median is None or not math.isfinite(median) or not median:
        return ""
    finite = values[np.isfinite(values)]
    count = int((finite > OUTLIER * abs(median)).sum())
    return f"{count} of {len(finite)} above {OUTLIER} times the median rule the mean" if count else ""


def _summarize(result: CellResult, when: When) -> tuple[BitsPerDim, str] | None:
    """Bits/dim and their scope: before the attack over all images, after it over the broken samples, since a failed
    search may return any image of the set."""
    values = floats(result.rows[f"nll_{when}"])
    scored = values if when == "before" else values[is_broken(result.rows)]
    if not len(scored):
        return None
    scope = f"over the {len(scored)} samples that the attack broke" if when == "after" else ""
    return bits_per_dim(scored), scope


def _number(when: When, median: bool = False) -> Callable[[CellResult], Number | None]:
    """Computes the mean of a cell's bits/dim, or with `median` the median of a classifier's cell."""

    def compute(result: CellResult) -> Number | None:
        if result.cell.attack.target == "flow":
            return _flow_number(result, when)
        if (found := _summarize(result, when)) is None:
            return None
        bits, scope = found
        flow = result.cell.nll_flow.name if result.cell.nll_flow else None
        if median:
            remarks = (ONE_DRAW, bits.median_note)
            return Number(bits.median, scope=scope, left_out=bits.n_nan, remarks=remarks, flow=flow)
        left_out = bits.n - bits.n_finite
        return Number(bits.mean, bits.lower, bits.upper, scope, left_out, 0, (ONE_DRAW, bits.note), flow)

    return compute


def _flow_number(result: CellResult, when: When) -> Number:
    values = floats(result.rows[f"nll_{when}"])
    bits = bits_per_dim(values)
    about = settings(result.cell)
    if when == "before":
        about = "; ".join([images(result.cell), draws_text(result.cell.attack)])
    remarks = (about, bits.note, outliers_note(values, bits.median))
    name = result.cell.model_name
    return Number(bits.mean, bits.lower, bits.upper, "", bits.n - bits.n_finite, 0, remarks, name)


def _flow_median(result: CellResult) -> Number:
    bits = bits_per_dim(floats(result.rows["nll_after"]))
    remarks = (settings(result.cell), bits.median_note)
    return Number(bits.median, left_out=bits.n_nan, remarks=remarks, flow=result.cell.model_name)


def _is_weighted(cell: CellRecord) -> bool:
    return estimate_of(cell.attack)[0] == "importance"


def _is_plain(cell: CellRecord) -> bool:
    return not _is_weighted(cell)


def _has_scores(cell: CellRecord) -> bool:
    return cell.nll_flow is not None


def _has_clean_scores(cell: CellRecord) -> bool:
    return _is_plain(cell) if cell.attack.target == "flow" else _has_scores(cell)


_bits = partial(Metric, unit=BITS, better="lower", absolute=0.01, place=10)
_of_flow = partial(_bits, targets=("flow",))


def _after(name: str, words: str, applies: Callable[[CellRecord], bool]) -> tuple[Metric, Metric]:
    """The mean and the median of bits/dim after attacks on a flow."""
    title = f"{words}bits/dim after the attack"
    mean = _of_flow(name, title, headline=True, applies=applies, compute=lambda r: _flow_number(r, "after"))
    return mean, _of_flow(f"{name}_median", f"median {title}", applies=applies, compute=_flow_median)


BEFORE = _bits(
    "bits_per_dim_before", "bits/dim before the attack", attacked=False, targets=("classifier", "flow"),
    applies=_has_clean_scores, compute=_number("before"),
)  # fmt: skip
BEFORE_MEDIAN = _bits(
    "bits_per_dim_before_median", "median bits/dim before the attack", attacked=False, applies=_has_scores,
    compute=_number("before", median=True),
)  # fmt: skip
AFTER = _bits(
    "bits_per_dim_after", "bits/dim after the attack", column="NLL", part=NLL_PART, compared=False, applies=_has_scores,
    compute=_number("after"),
)  # fmt: skip
AFTER_MEDIAN = _bits(
    "bits_per_dim_after_median",
    "median bits/dim after the attack",
    applies=_has_scores,
    compute=_number("after", median=True),
)
WEIGHTED_BEFORE = _of_flow(
    f"{WEIGHTED}bits_per_dim_before", "importance-weighted bits/dim before the attack", attacked=False,
    applies=_is_weighted, compute=lambda r: _flow_number(r, "before"),
)  # fmt: skip
register(*_after("bits_per_dim", "", _is_plain), BEFORE, BEFORE_MEDIAN, AFTER, AFTER_MEDIAN)
register(*_after(f"{WEIGHTED}bits_per_dim", "importance-weighted ", _is_weighted), WEIGHTED_BEFORE)
