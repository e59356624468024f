"""Run folders made without a model: every row a function of a seed, so that a test can hold what it wrote."""

import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from robbench.attacks.witness import Witness
from robbench.cards import Architecture, FlowReference, ModelCard, Weights
from robbench.specs import ResolvedAttack, resolve_attack, threat_models
from robbench.store.ledger import Ledger
from robbench.store.records import CellRecord, PlanEntry, RunFile, join_ids
from robbench.store.shards import SCHEMAS

SHAPE = (1, 2, 2)
FLOW = FlowReference(name="digits-glow", sha256="f" * 64)
WEIGHTS = "c" * 64


@cache
def attack(name: str) -> ResolvedAttack:
    """A shipped attack on digits."""
    return resolve_attack(name, "digits", threat_models())


def card(name: str) -> ModelCard:
    return ModelCard(
        name=name,
        kind="classifier",
        description="made by the tests",
        dataset="digits",
        defense="standard",
        architecture=Architecture(name="digits-cnn"),
        input_shape=SHAPE,
        classes=10,
        weights=Weights(file="weights.safetensors", sha256=WEIGHTS),
    )


def cell(model: str, attack: ResolvedAttack, number: int) -> CellRecord:
    return CellRecord(
        hash=f"{number:016x}" + "b" * 48,
        model=model,
        defense="standard",
        dataset="digits",
        dataset_revision="d" * 64,
        seed=0,
        attack=attack,
        model_sha256=WEIGHTS,
        attack_flow=FLOW if attack.needs_flow else None,
        nll_flow=FLOW,
        engine="robbench engine 1",
        status="ok",
    )


def image(rng: np.random.Generator) -> bytes:
    return rng.random(SHAPE, dtype=np.float32).tobytes()


def witness(rng: np.random.Generator, label: int) -> bytes:
    size = int(np.prod(SHAPE))
    arrays = {"lambda": rng.normal(size=size), "delta": rng.normal(size=SHAPE)}
    return Witness(FLOW.sha256, label, {k: v.astype(np.float32) for k, v in arrays.items()}).to_bytes()


def rows(ids: Sequence[int], kept: Iterable[int], seed: int, latent: bool = False) -> pa.Table:
    """Ledger rows of the samples; those in `kept` with an example, and with `latent` a witness."""
    rng, n, stored = np.random.default_rng([seed, *ids]), len(ids), set(kept)
    robust = rng.random(n) < 0.5
    labels = np.array([i % 10 for i in ids])
    floats = ("clean_margin", "l1", "l2", "linf", "l0", "cross_entropy", "nll_before", "nll_after")
    columns: dict[str, object] = {name: rng.random(n).astype(np.float32) for name in floats}
    columns |= {"sample_id": list(ids), "label": labels, "clean_prediction": labels, "robust": robust}
    columns |= {"prediction": np.where(robust, labels, (labels + 1) % 10)}
    columns |= {"margin": np.where(robust, 0.5, -0.5).astype(np.float32)}
    columns |= {"broken_by": [None if held else "pgd20" for held in robust.tolist()]}
    columns |= {"broken_at": np.where(robust, -1, 3), "forwards": [22] * n, "backwards": [20] * n}
    columns |= {"counts_exact": [True] * n, "target": [None] * n, "reached": [None] * n}
    columns |= {"example": [image(rng) if i in stored else None for i in ids]}
    columns |= {"witness": [witness(rng, i % 10) if latent and i in stored else None for i in ids]}
    return pa.table(
        {name: columns[name] for name in SCHEMAS["classifier"].names}, schema=SCHEMAS["classifier"]
    )


def likelihood_rows(ids: Sequence[int], kept: Iterable[int], seed: int) -> pa.Table:
    rng, n, stored = np.random.default_rng([seed, *ids]), len(ids), set(kept)
    columns: dict[str, object] = {
        name: rng.random(n) for name in ("nll_before", "nll_after", "l1", "l2", "linf")
    }
    columns |= {"sample_id": list(ids), "label": [i % 10 for i in ids], "forwards": [2] * n}
    columns |= {"backwards": [1] * n}
    columns |= {name: [image(rng) if i in stored else None for i in ids] for name in ("original", "example")}
    schema = SCHEMAS["flow"]
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def write_run(
    folder: Path,
    attacks: Sequence[str] = ("pgd20", "jsa50"),
    models: Sequence[str] = ("alpha", "beta"),
    ids: Sequence[int] = (3, 11, 5, 8, 20),
    blocks: int = 2,
    kept: Sequence[int] = (3, 11, 5),
    seed: int = 0,
) -> RunFile:
    """A finished run of `models` x `attacks` on `ids`, every cell in `blocks` shards."""
    ledger = Ledger(folder)
    records = [
        cell(model, attack(name), 100 * m + a)
        for m, model in enumerate(models)
        for a, name in enumerate(attacks)
    ]
    run = RunFile(
        dataset="digits",
        dataset_revision="d" * 64,
        seed=0,
        shape=SHAPE,
        class_names=tuple("0123456789"),
        n=len(ids),
        models=tuple(models),
        attacks=tuple(attacks),
        cells=tuple(
            PlanEntry(hash=r.hash, model=r.model, defense=r.defense, attack=r.attack.label) for r in records
        ),
        versions={"robbench": "0.1.0", "torch": "2.0.0"},
        samples=join_ids(ids),
    )
    ledger.write_run(run, {name: card(name) for name in models}, records)
    for record in records:
        for block in range(blocks):
            part = list(ids)[block::blocks]
            table = rows(part, kept, seed, record.attack.needs_flow)
            ledger.write_shard(record.hash, block, table, 0.25, '{"samples": 2}')
    rng = np.random.default_rng(9)
    images = {i: rng.random(SHAPE, dtype=np.float32) for i in kept}
    ledger.add_originals(images, lambda path, reason: None)
    return run


# ------------------------------------------------------------------------------------------------ crafted bundles
Edit = Callable[[dict[str, bytes]], object]


def contents(bundle: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(bundle) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def edited(bundle: Path, target: Path, edit: Edit, rehash: bool = False) -> Path:
    """`bundle` with `edit` done to its files by name; rehash: the manifest lists what is there then."""
    files = contents(bundle)
    edit(files)
    if rehash:
        rehashed(files)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target


def rehashed(files: dict[str, bytes]) -> None:
    import hashlib

    manifest = json.loads(files["manifest.json"])
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        for name, content in sorted(files.items())
        if name != "manifest.json"
    }
    files["manifest.json"] = json.dumps(manifest).encode()


def set_manifest(files: dict[str, bytes], **changes: object) -> None:
    files["manifest.json"] = json.dumps(json.loads(files["manifest.json"]) | changes).encode()
