"""Goals and Markdown tables of `robbench bench flows`."""

from dataclasses import dataclass
from typing import Any

from robbench.benchmarks.pages import head, missing, page, spread, table

REFERENCE = "robbench none"


@dataclass(frozen=True)
class Goal:
    """A goal, reached where `value` is at most `limit`."""

    what: str
    value: float
    limit: float


def goals(result: dict[str, Any]) -> list[Goal]:
    """Goals for the small image Glow, without those whose libraries are missing."""
    ratio, memory = result["ratio"]["tuned"], result["memory_bytes"]
    found = []
    for kind, name in (("frozen", "as constructed"), ("channels_last", "in channels_last")):
        peers = [ratio[peer][1] for peer in ratio if peer.endswith(f" {kind}")]
        if peers:
            found.append(
                Goal(f"time, of the fastest frozen library {name}, same malloc", 1 / min(peers), 0.7)
            )
    naive = result["ratio_default_to_tuned_reference"]
    loops = [naive[peer][1] for peer in naive if peer.endswith(" naive")]
    if loops:
        found.append(Goal("time, of the fastest naive loop with default malloc", 1 / min(loops), 0.45))
    for mode, limit in (("mask", 0.3), ("invert", 0.02)):
        share = memory[f"robbench {mode}"] / memory[REFERENCE]
        found.append(Goal(f"memory of `{mode}`, of `none`", share, limit))
    found.append(Goal("time of `mask`, of `none`", ratio["robbench mask"][1], 1.1))
    return found


def markdown(report: dict[str, Any]) -> str:
    """The tables as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        *head("Decode + backward to the latents of a frozen flow", report["command"]),
        f"{report['cpu']}, {report['threads']} thread(s); {versions}.",
        "",
        f'Ratios to `{REFERENCE}` of the same round: median [quartiles]; above 1 is slower than robbench. "tuned" and',
        '"default": both with that malloc; "default to tuned": against robbench under tuned malloc, which its commands',
        "use. `robbench/benchmarks/flows.py` says what the kinds are and how the functions are checked to be the same.",
    ]
    for name, result in report["cases"].items():
        lines += ["", f"## {name}: {result['flow']}, batch {result['batch']}, {result['rounds']} rounds", ""]
        lines += [*_table(result), *missing(result["absent"])]
        if name == "small":
            lines += [
                "",
                *table(("goal: robbench's ...", "reached", "at most", ""), map(_goal_row, goals(result))),
            ]
    return page(lines)


def _goal_row(goal: Goal) -> list[str]:
    verdict = "met" if goal.value <= goal.limit else f"missed by {goal.value / goal.limit - 1:.0%}"
    return [goal.what, f"{goal.value:.3f}", str(goal.limit), verdict]


def _table(result: dict[str, Any]) -> list[str]:
    header = (
        "",
        "tuned, ms",
        "ratio, tuned",
        "default to tuned robbench",
        "ratio, default",
        "kept, MB",
        "kept, ratio",
    )
    memory, ratio = result["memory_bytes"], result["ratio"]
    rows = [
        [
            name,
            spread([1000 * second for second in result["seconds"]["tuned"][name]], 1),
            spread(ratio["tuned"][name], 2),
            spread(result["ratio_default_to_tuned_reference"].get(name), 2),
            spread(ratio.get("default", {}).get(name), 2),
            f"{kept / 1e6:.2f}",
            f"{kept / memory[REFERENCE]:.3f}",
        ]
        for name, kept in memory.items()
    ]
    return table(header, rows)
