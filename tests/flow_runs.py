"""Builders of cells on flows, as records and frames: nothing is read from disk."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from publish_runs import SHAPE, card, cell, make_run

from robbench.cards import ModelCard
from robbench.specs import ResolvedAttack
from robbench.store.records import CellResult, Run

N = 40
DEFENSES = {"toy-glow": "clean", "toy-glow-at": "at", "toy-glow-hybrid": "hybrid"}


def flow_attack(name: str, epsilon: float = 8, steps: int | None = None) -> ResolvedAttack:
    """nll-in, nll-out or noise with epsilon of 255; steps: given by hand."""
    images = {"images": "noise" if name == "nll-out" else "test", "quantize": False, "noise_draws": 1}
    searched = {"steps": steps or (100 if name == "nll-out" else 32), "step_size": None, "restarts": 1}
    label = f"{name}@{epsilon:g}" + (f"@{steps}steps" if steps and name != "noise" else "")
    return ResolvedAttack(
        name=name,
        label=label,
        threat_model="likelihood",
        target="flow",
        space="image",
        norm="linf",
        pixel_range=255,
        epsilon=epsilon,
        eta=None,
        algorithm="uniform-noise" if name == "noise" else "nll",
        parameters=images if name == "noise" else images | searched,
    )


def flow_frame(seed: int, after: float = 6.0, kept: int = 8) -> pd.DataFrame:
    """Rows of `N` samples, the first `kept` with images; the ids are those of `publish_runs.frame(N, ...)`."""
    rng = np.random.default_rng(seed)
    ids = np.sort(np.random.default_rng(1000).permutation(3 * N)[:N])
    x = rng.random((N, *SHAPE)).astype("<f4")
    x_adv = np.clip(x + (8 / 255) * np.sign(rng.normal(size=x.shape)), 0, 1).astype("<f4")
    distance = np.abs(x_adv - x).reshape(N, -1)
    return pd.DataFrame(
        {
            "sample_id": ids,
            "label": rng.integers(0, 10, N),
            "nll_before": rng.normal(3.0, 0.2, N),
            "nll_after": rng.normal(after, 0.4, N),
            "l1": distance.sum(1).astype(np.float32),
            "l2": np.sqrt((distance**2).sum(1)).astype(np.float32),
            "linf": distance.max(1).astype(np.float32),
            "forwards": np.full(N, 34),
            "backwards": np.full(N, 32),
            "original": [x[i].tobytes() if i < kept else None for i in range(N)],
            "example": [x_adv[i].tobytes() if i < kept else None for i in range(N)],
        }
    )


def flow_cell(model: str, spec: ResolvedAttack, rows: pd.DataFrame, **changes: object) -> CellResult:
    own: dict[str, object] = {"defense": DEFENSES.get(model, "clean"), "nll_flow": None}
    return cell(model, spec, rows, **{**own, **changes})


def flow_card(name: str) -> ModelCard:
    return card(name, DEFENSES.get(name, "clean")).model_copy(update={"kind": "flow", "classes": None})


def flow_run(cells: Sequence[CellResult]) -> Run:
    run = make_run(list(cells), N)
    for result in cells:
        if result.cell.attack.target == "flow":
            run.cards[result.cell.model] = flow_card(result.cell.model)
    return run


def three_flows() -> Run:
    """Three flows under three attacks at two budgets, all done."""
    specs = [flow_attack(name, epsilon) for epsilon in (2, 8) for name in ("nll-in", "nll-out", "noise")]
    return flow_run(
        [
            flow_cell(model, spec, flow_frame(7 * k + j, after=4.0 + 2 * j))
            for k, model in enumerate(DEFENSES)
            for j, spec in enumerate(specs)
        ]
    )
