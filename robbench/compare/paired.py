"""Holding a run to a reference run on the same samples, component by component.

An interval cannot see a weak attack: at n = 360 it is ten points wide, and an attack with a tenth of its iterations
loses two. The same samples under the same random numbers can: an unchanged engine repeats itself sample by sample, up
to rounding. So what is judged is how many samples went another way, and whether they all lean to one side.

* identity: data, sample ids, labels, the attack with all its parameters, weights of model and flow are the same, and so
  are the margins (bits/dim) before the attack;
* verdicts: samples whose verdict flipped, near ties aside, against a binomial at `Rules.flip_rate`;
* trajectories: samples that went another way (another verdict, component or step, another margin or size beyond
  rounding) against a binomial at `Rules.moved_rate`;
* direction: exact sign tests over the samples that moved: verdicts (McNemar), margins, steps at the break;
* calls: forwards and backwards of the samples that hold in both runs: `Rules.calls` relative.

Rates and thresholds are measured: docs/check.md.
"""

from dataclasses import dataclass, replace

from robbench.compare.comparison import Comparison, Verdict
from robbench.compare.keys import pair_rows
from robbench.compare.pairs import IDENTITY, Pair, Shift
from robbench.compare.policy import PolicyName
from robbench.compare.samples import CellSamples, Samples
from robbench.specs import ResolvedAttack
from robbench.statistics.paired import sign_test
from robbench.store.merged import changed_entries

ALL_MODELS = "all models"


@dataclass(frozen=True)
class Rules:
    """How much may change without anything being wrong.

    flip_rate, moved_rate: shares of samples whose verdict (whose search) rounding may send another way; a count fails
    when a binomial at that rate exceeds it with a probability below alpha. None: not judged. alpha: also of the sign
    tests. calls: relative change of model calls, None: not judged.
    """

    flip_rate: float | None = 0.005
    moved_rate: float | None = 0.02
    alpha: float = 1e-4
    calls: float | None = 0.05


RULES: dict[PolicyName, Rules] = {
    "default": Rules(),
    "exact": Rules(flip_rate=0.0, moved_rate=0.0, calls=0.0),
    "interval": Rules(flip_rate=None, moved_rate=None),
}


def compare_samples(
    reference: Samples, measured: Samples, policy: PolicyName = "default", rules: Rules | None = None
) -> list[Comparison]:
    """Every cell of the reference, by component (`IDENTITY` first); then every component over `ALL_MODELS` where there
    are several.

    rules: in place of those of the policy. A cell that the run lacks is "not run"; one that failed, or lacks samples of
    the reference, fails.
    """
    rules = rules or RULES[policy]
    results: list[Comparison] = []
    pooled: dict[tuple[str, str], list[Pair]] = {}
    cells = reference.cells.values(), measured.cells.values()
    for cell, found in pair_rows(*cells, lambda one: one.identity.key):
        model, attack = cell.identity.model, cell.identity.attack.label
        ours = found[0] if found else None
        pair = None if ours is None else Pair.of(cell, ours)
        results.append(_identity(reference, measured, cell, ours, pair))
        if pair is None or results[-1].verdict == "not run":
            continue
        for component, part in pair.groups():
            results.append(_judge(model, attack, component, part, rules))
            pooled.setdefault((attack, component), []).append(part)
    for (attack, component), parts in pooled.items():
        if len(parts) > 1:
            results.append(_judge(ALL_MODELS, attack, component, Pair.join(parts), rules))
    return [replace(result, path=reference.path) for result in results]


def _identity(
    reference: Samples, measured: Samples, cell: CellSamples, ours: CellSamples | None, pair: Pair | None
) -> Comparison:
    """Whether both cells are of the same thing. pair: of the samples that both have."""
    blank = Comparison(cell.identity.model, cell.identity.attack.label, metric="", component=IDENTITY)
    if ours is None or pair is None:
        return blank.with_verdict("not run", "not in the run")
    if ours.problem and not ours.failed and not len(pair):
        return blank.with_verdict("not run", ours.problem)
    problems = [*_differences(reference, measured, cell, ours), *pair.inputs()]
    missing = len(cell.rows) - len(pair)
    if ours.failed:
        problems = [ours.problem]
    elif missing:
        problems.append(f"lacks {missing} of the reference's {len(cell.rows)} samples")
    verdict: Verdict = "fail" if problems else "pass"
    return replace(blank, shift=Shift(n=len(pair))).with_verdict(verdict, "; ".join(problems))


def _differences(reference: Samples, measured: Samples, cell: CellSamples, ours: CellSamples) -> list[str]:
    """What the cells depend on and do not share, in words."""
    theirs, mine = reference.identity, measured.identity
    pairs: list[tuple[str, object, object]] = [
        ("dataset", theirs.dataset, mine.dataset),
        ("data revision", theirs.dataset_revision[:12], mine.dataset_revision[:12]),
        ("seed", theirs.seed, mine.seed),
        ("weights or architecture", cell.identity.model_hash[:12], ours.identity.model_hash[:12]),
        ("flow", cell.identity.flow_sha256[:12], ours.identity.flow_sha256[:12]),
        ("precision", cell.identity.precision, ours.identity.precision),
        ("search precision", cell.identity.search_precision, ours.identity.search_precision),
        *spec_changes(cell.identity.attack, ours.identity.attack),
    ]
    return [f"{name} {new}, reference {old}" for name, old, new in pairs if old != new]


def spec_changes(before: ResolvedAttack, now: ResolvedAttack) -> list[tuple[str, object, object]]:
    """Differing entries of two attacks, "attack spec parameters.iterations" with both values; labels are only names."""
    one, other = (attack.model_dump(mode="json", exclude={"label"}) for attack in (before, now))
    return [(f"attack spec {key}", old, new) for key, old, new in changed_entries(one, other)]


def _judge(model: str, attack: str, component: str, pair: Pair, rules: Rules) -> Comparison:
    shift = pair.shift()
    unscored = [f"{shift.unscored} of {shift.n} scores are NaN now"] if shift.unscored else []
    problems = [*unscored, *_counts(shift, rules), *_leaning(shift, rules), *_calls(shift, rules)]
    if problems and abs(shift.size - shift.reference_size) > 0.01 * shift.reference_size:
        problems.append(f"perturbations reach {shift.size:.4g}, in the reference {shift.reference_size:.4g}")
    reason = f"{attack}, component {component}: {'; '.join(problems)}" if problems else ""
    found = Comparison(model, attack, metric="", component=component, shift=shift, n=shift.n)
    return found.with_verdict("fail" if problems else "pass", reason)


def _counts(shift: Shift, rules: Rules) -> list[str]:
    """Counts beyond what rounding may do."""
    flips, limits = shift.lost + shift.gained, (rules.flip_rate, rules.moved_rate)
    texts = (
        f"{flips} of {shift.n} verdicts flipped ({shift.lost} broken now, {shift.gained} robust now)",
        f"{shift.moved} of {shift.n} searches went another way",
    )
    return [
        f"{text}, {largest_count(shift.n, rate, rules.alpha)} are allowed"
        for text, count, rate in zip(texts, (flips, shift.moved), limits, strict=True)
        if rate is not None and count > largest_count(shift.n, rate, rules.alpha)
    ]


def _leaning(shift: Shift, rules: Rules) -> list[str]:
    """Changes that all lean to one side."""
    pairs = (
        (shift.gained, shift.lost, "verdicts turned robust, {b} turned broken"),
        (
            shift.up,
            shift.down,
            f"of the changed scores are higher, {{b}} lower, median change {shift.shift:+.3g}",
        ),
        (shift.later, shift.earlier, "breaks come at a later step, {b} at an earlier one"),
    )
    return [
        f"{a} {text.format(b=b)} (sign test p = {sign_test(a, b):.1g})"
        for a, b, text in pairs
        if sign_test(a, b) < rules.alpha
    ]


def _calls(shift: Shift, rules: Rules) -> list[str]:
    pairs = (
        ("forwards", shift.reference_forwards, shift.forwards),
        ("backwards", shift.reference_backwards, shift.backwards),
    )
    return [
        f"{now} {name} on samples that hold, in the reference {before}"
        for name, before, now in pairs
        if rules.calls is not None and abs(now - before) > rules.calls * before
    ]


def largest_count(n: int, rate: float, alpha: float) -> int:
    """Smallest k with P(X > k) <= alpha for X binomial (n, rate): any larger count is a surprise."""
    from scipy.stats import binom

    return int(binom.isf(alpha, n, rate)) if n and rate else 0
