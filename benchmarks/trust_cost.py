"""Share of the main job that the battery before an attack, the audit after it and the checks of a flow take.

Attacks digits-ijsat with the main job's attacks (360 test images in blocks) and adds up the seconds of one
CPU thread inside `check_model`, `check_afterwards`, `probe_flow`, its repetition and `require_latent_budget`.

    python benchmarks/trust_cost.py
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from robbench.attacks import Victim, base, build_attack
from robbench.attacks.codec import FlowProbe
from robbench.core.threads import thread_rule
from robbench.data import load_dataset, sample_ids
from robbench.models.loading import load_flow, load_model
from robbench.models.zoo import default_flow, find_models, zoo_entries
from robbench.run.cells import SHARD_SIZE
from robbench.specs import resolve_attack, threat_models

ATTACKS = ("pgd20", "aa", "jsa50")
CHECKS = ("check_model", "check_afterwards", "probe_flow", "require_latent_budget")


class Stopwatch:
    """Seconds of this process spent in wrapped functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str) -> None:
        """Time every call of `owner.name` from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begun

        setattr(owner, name, timed)


def main() -> None:
    entries, dataset, watch = zoo_entries(), load_dataset("digits"), Stopwatch()
    victim, flow = (
        Victim(load_model(find_models("ijsat", "digits", entries)[0]).module),
        default_flow("digits", entries),
    )
    assert flow is not None
    ids = sample_ids(dataset.test, None, seed=0)
    for name in CHECKS:
        watch.wrap(base, name)
    watch.wrap(FlowProbe, "repeat")
    with thread_rule(1):
        begun = time.process_time()
        for name in ATTACKS:
            attack = build_attack(resolve_attack(name, "digits", threat_models()), load_flow(flow))
            for start in range(0, len(ids), SHARD_SIZE):
                part = ids[start : start + SHARD_SIZE]
                x, y = dataset.test.by_ids(part)
                attack.evaluate(victim, torch.tensor(part), x, y, seed=0, batch_size=256)
            print(f"{name}: {time.process_time() - begun:.1f} s so far")
        total = time.process_time() - begun
    checks = sum(watch.seconds.values())
    for name, seconds in watch.seconds.items():
        print(f"{name}: {seconds:.2f} s")
    print(f"checks: {checks:.2f} of {total:.1f} s, {100 * checks / total:.2f} %")


if __name__ == "__main__":
    main()
