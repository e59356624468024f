"""Goals and Markdown tables of `robbench bench flows`."""

from dataclasses import dataclass
from typing import Any

from robbench.benchmarks.timing import spread

REFERENCE = "robbench none"


@dataclass(frozen=True)
class Goal:
    """value is reached when it is at most `limit`."""

    what: str
    value: float
    limit: float


def goals(result: dict[str, Any]) -> list[Goal]:
    """The project's goals for the small image Glow; those whose libraries are absent are left out."""
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
    """The tables for people."""
    lines = ["# Decode + backward to the latents of a frozen flow", "", f"    {report['command']}", ""]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [f"{report['cpu']}, {report['threads']} thread(s); {versions}.", ""]
    lines += [
        f'Ratios to `{REFERENCE}` of the same round: median [quartiles]; above 1 is slower than robbench. "tuned" and',
        '"default": both with that malloc; "default to tuned": against robbench under tuned malloc, which its commands',
        "use. `robbench/benchmarks/flows.py` says what the kinds are and how the functions are checked to be the same.",
    ]
    for name, result in report["cases"].items():
        lines += ["", f"## {name}: {result['flow']}, batch {result['batch']}, {result['rounds']} rounds", ""]
        lines += _table(result)
        lines += [f"* {library} is missing: {reason}" for library, reason in result["absent"].items()]
        if name == "small":
            lines += ["", "| goal: robbench's ... | reached | at most | |", "|---|---|---|---|"]
            for goal in goals(result):
                verdict = (
                    "met" if goal.value <= goal.limit else f"missed by {goal.value / goal.limit - 1:.0%}"
                )
                lines.append(f"| {goal.what} | {goal.value:.3f} | {goal.limit} | {verdict} |")
    return "\n".join(lines) + "\n"


def _table(result: dict[str, Any]) -> list[str]:
    lines = [
        "| | tuned, ms | ratio, tuned | default to tuned robbench | ratio, default | kept, MB | kept, ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    memory = result["memory_bytes"]
    for name in memory:
        cells = [
            spread([1000 * second for second in result["seconds"]["tuned"][name]], 1),
            spread(result["ratio"]["tuned"][name], 2),
            spread(result["ratio_default_to_tuned_reference"].get(name), 2),
            spread(result["ratio"].get("default", {}).get(name), 2),
            f"{memory[name] / 1e6:.2f}",
            f"{memory[name] / memory[REFERENCE]:.3f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
