"""Builders of runs as records and frames, for the tests of this folder: nothing is read from disk."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from robbench.attacks.named import ENGINE_VERSION
from robbench.cards import Architecture, FlowReference, Measurement, ModelCard, Training, Weights
from robbench.specs import ResolvedAttack
from robbench.store.records import CellRecord, CellResult, Run

SHAPE = (1, 8, 8)
SEED = 3


def attack(
    label: str = "pgd20", threat_model: str = "linf", epsilon: float = 0.2, **changes: object
) -> ResolvedAttack:
    values = {
        "name": label.split("@")[0],
        "label": label,
        "threat_model": threat_model,
        "space": "image",
        "norm": "linf",
        "epsilon": epsilon,
        "eta": None,
        "algorithm": "pgd",
        "parameters": {},
    }
    return ResolvedAttack.model_validate(values | changes)


JSA = attack("jsa50", "joint", 0.2, space="joint", eta=0.35)
FLOW = FlowReference(name="digits-glow", sha256="f" * 64)


def images(ids: Sequence[int]) -> np.ndarray:
    """Clean images [n,C,H,W] in [0,1] by sample id."""
    return np.stack([np.random.default_rng(int(i)).random(SHAPE, dtype=np.float32) for i in ids])


def corruption_spec(name: str, severity: int) -> ResolvedAttack:
    return attack(
        f"c-{name}-{severity}",
        "corruptions",
        space="corruption",
        norm="none",
        epsilon=None,
        algorithm="corruption",
        parameters={"corruption": name, "severity": severity, "sha256": "a" * 64},
    )


def generated_spec(name: str, severity: int) -> ResolvedAttack:
    own = {"parameters": {"corruption": name, "severity": severity, "generator": 1}}
    names = {"name": f"g-{name}-{severity}", "label": f"g-{name}-{severity}"}
    of = {"threat_model": "corruptions-generated", "algorithm": "generated-corruption"}
    return corruption_spec(name, severity).model_copy(update=own | names | of)


def frame(n: int, clean_rate: float, robust_rate: float, seed: int, component: str = "pgd20") -> pd.DataFrame:
    """Plausible ledger rows: clean verdicts depend on `clean_rate` only, the rest on `seed`."""
    shared, rng = np.random.default_rng(1000), np.random.default_rng(seed)
    ids = np.sort(shared.permutation(3 * n)[:n])
    labels = shared.integers(0, 10, n)
    clean_ok = shared.random(n) < clean_rate
    robust = clean_ok & (rng.random(n) < robust_rate)
    x = images(ids)
    x_adv = np.clip(x + 0.2 * np.sign(rng.normal(size=x.shape)), 0, 1).astype("<f4")
    distance = np.abs(x_adv - x).reshape(n, -1)
    return pd.DataFrame(
        {
            "sample_id": ids,
            "label": labels,
            "clean_prediction": np.where(clean_ok, labels, (labels + 1) % 10),
            "prediction": np.where(robust, labels, (labels + 3) % 10),
            "clean_margin": np.where(clean_ok, 1.0, -1.0).astype(np.float32),
            "margin": np.where(robust, 0.7, -0.3).astype(np.float32),
            "robust": robust,
            "broken_by": [
                None if r else ("clean" if not c else component)
                for r, c in zip(robust, clean_ok, strict=True)
            ],
            "broken_at": np.where(robust, -1, np.where(clean_ok, 4, 0)),
            "l1": distance.sum(1).astype(np.float32),
            "l2": np.sqrt((distance**2).sum(1)).astype(np.float32),
            "linf": distance.max(1).astype(np.float32),
            "cross_entropy": rng.random(n).astype(np.float32),
            "nll_before": rng.normal(2.0, 0.3, n).astype(np.float32),
            "nll_after": rng.normal(4.0, 0.5, n).astype(np.float32),
            "forwards": np.full(n, 22),
            "backwards": np.full(n, 20),
            "counts_exact": np.full(n, True),
            "example": [x_adv[i].tobytes() if i < 12 else None for i in range(n)],
        }
    )


def cell(model: str, spec: ResolvedAttack, rows: pd.DataFrame, **changes: object) -> CellResult:
    digit = f"{abs(hash_text(model + spec.label)):064x}"[-64:]
    record = CellRecord(
        hash=digit,
        model=model,
        defense="ijsat" if "ijsat" in model else "standard",
        dataset="digits",
        dataset_revision="d" * 64,
        seed=SEED,
        attack=spec,
        model_sha256=f"{abs(hash_text(model)):064x}"[-64:],
        attack_flow=FLOW if spec.needs_flow else None,
        nll_flow=FLOW,
        engine=f"robbench engine {ENGINE_VERSION}",
        status="ok",
        seconds=1.25,
    )
    return CellResult(record.model_copy(update=changes), rows)


def hash_text(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def card(name: str, defense: str) -> ModelCard:
    return ModelCard(
        name=re.sub("[^a-z0-9]+", "-", name).strip("-"),  # a card takes no other; tables must stand any name
        kind="classifier",
        description=f"Small CNN trained by {defense}.",
        dataset="digits",
        defense=defense,
        architecture=Architecture(name="small-cnn", arguments={"width": 16}),
        input_shape=SHAPE,
        classes=10,
        weights=Weights(file="weights.safetensors", sha256=f"{abs(hash_text(name)):064x}"[-64:]),
        training=Training(
            command=f"robbench train --defense {defense} --dataset digits --seed 0",
            seed=0,
            recipe="digits",
            parameters={"epsilon": 0.2, "steps": 10},
            train_samples=1077,
            validation_samples=360,
            epochs=60,
            selected_epoch=57,
            selection="validation",
            flow=FLOW if defense == "ijsat" else None,
            versions={"torch": "2.8.0"},
            minutes=2.5,
        ),
        measurements=(
            Measurement(
                metric="accuracy",
                value=91.4,
                unit="%",
                split="validation",
                n=360,
                lower=88.0,
                upper=93.9,
                command="robbench run",
            ),
        ),
    )


def make_run(cells: list[CellResult], n: int) -> Run:
    ids = cells[0].rows["sample_id"].tolist()
    return Run(
        folder=Path("robbench-runs/digits"),
        dataset="digits",
        dataset_revision="d" * 64,
        seed=SEED,
        n=n,
        shape=SHAPE,
        class_names=tuple(str(d) for d in range(10)),
        sample_ids=tuple(ids),
        cells=cells,
        cards={r.cell.model: card(r.cell.model, r.cell.defense) for r in cells},
        versions={"robbench": "0.1.0", "torch": "2.8.0", "python": "3.11.9"},
    )
