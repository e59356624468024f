"""`verify` never says fine of a bundle whose printed numbers are others, and never ends in a traceback."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from fuzzing import allowed, cases, chosen, command, copied, flipped, numbers

from robbench.bundle.examples import ExampleChoice
from robbench.bundle.export import ExportRequest, export_run
from robbench.bundle.runs import open_runs
from robbench.store.ledger import Ledger, load_run
from robbench.store.shards import SCHEMAS

MUTATED, FORGED = 500, 47  # 547 in all
FINE = (0, 3)  # exit codes that say that nothing differs
Entries = dict[str, bytes]


# ------------------------------------------------------------------------------------- accidents, and clumsy hands
def entries(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(found: Entries) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in found.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def tree_changed(content: bytes, rng: np.random.Generator) -> bytes:
    """A JSON or YAML text with one digit or word replaced."""
    text = content.decode()
    digits = [k for k, character in enumerate(text) if character.isdigit()]
    at = chosen(rng, digits)
    return (text[:at] + str(int(rng.integers(10))) + text[at + 1 :]).encode()


def mutated(original: bytes, parts: Entries, rng: np.random.Generator) -> bytes:
    """A bundle with something wrong in its bytes, its entries or their content."""
    kind, found = int(rng.integers(9)), dict(parts)
    name = chosen(rng, sorted(found))
    texts = [name for name in sorted(found) if name.endswith((".json", ".yaml"))]
    if kind == 0:
        return flipped(original, rng, int(rng.integers(1, 5)))
    if kind == 1:
        return original[: int(rng.integers(len(original)))]
    if kind == 2:
        del found[name]
    elif kind == 3:
        found[f"{name}.more"] = found[name]
    elif kind == 4:
        found[name] = flipped(found[name], rng)
    elif kind == 5:
        changed = chosen(rng, texts)
        found[changed] = tree_changed(found[changed], rng)
    elif kind == 6:
        changed = chosen(rng, [name for name in texts if name != "manifest.json"])
        found[changed] = tree_changed(found[changed], rng)
        found = rehashed(found)
    elif kind == 7:
        other = chosen(rng, sorted(found))
        found[name], found[other] = found[other], found[name]
        found = rehashed(found)
    else:
        found[chosen(rng, ["../../evil", "/evil", "a/../../evil", "cells/x/y", "run.yaml/", "C:\\evil"])] = (
            b"x"
        )
        found = rehashed(found)
    return packed(found)


def rehashed(found: Entries) -> Entries:
    """With sizes and sha256 of all files put into the manifest, as somebody who knows the format would."""
    import hashlib

    manifest = json.loads(found["manifest.json"])
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        for name, content in found.items()
        if name != "manifest.json"
    }
    return {**found, "manifest.json": json.dumps(manifest).encode()}


def read(path: Path) -> dict[tuple[object, ...], object] | None:
    """The numbers that reports print of a bundle; None of one that is refused."""

    def run_numbers() -> dict[tuple[object, ...], object]:
        with open_runs([path]) as [run]:
            return numbers(run)

    return allowed(run_numbers)


def test_mutated_bundles(tmp_path: Path, bundle: Path) -> None:
    original, parts = bundle.read_bytes(), entries(bundle)
    expected, refused, path = numbers_of(bundle), 0, tmp_path / "mutated.zip"
    for number, rng in cases(MUTATED, 6):
        path.write_bytes(mutated(original, parts, rng))
        result = command("verify", path, "--files-only", "--json")
        assert result.exit_code in (0, 1, 2, 3), (number, result.output)
        if result.exit_code in FINE:
            assert read(path) == expected, number
        refused += result.exit_code == 2
    assert refused
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mutated.zip"]


def numbers_of(bundle: Path) -> dict[tuple[object, ...], object]:
    found = read(bundle)
    assert found
    return found


# -------------------------------------------------------------------------------------------------------- forgers
Change = Callable[[pd.DataFrame, np.random.Generator], None]


def say_robust(rows: pd.DataFrame, rng: np.random.Generator) -> None:
    """Broken samples become robust ones that contradict nothing in themselves."""
    broken = rows.index[~rows["robust"] & (rows["clean_margin"] > 0)]
    for at in broken[: int(rng.integers(1, 6))]:
        rows.loc[at, ["prediction", "margin", "cross_entropy"]] = [rows.loc[at, "label"], 2.0, 0.2]
        rows.loc[at, "robust"], rows.loc[at, "broken_at"], rows.loc[at, "broken_by"] = True, -1, None


def say_broken(rows: pd.DataFrame, rng: np.random.Generator) -> None:
    robust = rows.index[rows["robust"]]
    for at in robust[: int(rng.integers(1, 6))]:
        rows.loc[at, ["prediction", "margin"]] = [(rows.loc[at, "label"] + 1) % 10, -0.5]
        rows.loc[at, "robust"], rows.loc[at, "broken_at"], rows.loc[at, "broken_by"] = False, 1, "fgsm"


def say_right(rows: pd.DataFrame, rng: np.random.Generator) -> None:
    """Images that the model gets wrong become right and robust."""
    wrong = rows.index[rows["clean_margin"] < 0]
    for at in wrong:
        rows.loc[at, ["clean_prediction", "prediction"]] = rows.loc[at, "label"]
        rows.loc[at, ["clean_margin", "margin", "cross_entropy"]] = [1.0, 1.0, 0.1]
        rows.loc[at, "robust"], rows.loc[at, "broken_at"], rows.loc[at, "broken_by"] = True, -1, None


def smaller(rows: pd.DataFrame, rng: np.random.Generator) -> None:
    """Distances shrink, as a weaker perturbation would have them."""
    for name in ("l1", "l2", "linf"):
        rows[name] = (rows[name] * 0.5).astype(np.float32)


CHANGES: list[Change] = [say_robust, say_broken, say_right, smaller]


def forged(folder: Path, out: Path, change: Change, rng: np.random.Generator) -> Path:
    """A bundle of a changed run: every digest, size and table is that of what is in it now."""
    ledger = Ledger(folder)
    run = ledger.read_run()
    assert run is not None
    for entry in run.cells:
        record = ledger.read_cell(entry.hash)
        assert record is not None
        for block, shard in enumerate(ledger.shards(entry.hash, lambda *_: None)):
            rows = shard.table.replace_schema_metadata().to_pandas()
            if change is say_right or rng.random() < 0.7:
                change(rows, rng)
            table = pa.Table.from_pandas(rows, SCHEMAS[record.attack.target], preserve_index=False)
            shard.path.unlink()
            ledger.write_shard(entry.hash, block, table, shard.seconds, shard.diagnostics)
    export_run(ExportRequest(folder, out, ExampleChoice.parse("all"), partial=True))
    return out


def test_forged_bundles(tmp_path: Path, undisturbed: Path, bundle: Path) -> None:
    """Asked with the models, and every cell run again: a number that the forger moved is seen."""
    expected, caught = numbers_of(bundle), 0
    models = [part for name in ("digits-standard", "digits-at") for part in ("--model", name)]
    honest = command("verify", bundle, *models, "--share", 1)
    assert honest.exit_code == 0, honest.output
    for number, rng in cases(FORGED, 7):
        folder = copied(undisturbed, tmp_path / "run")
        path = forged(folder, tmp_path / "forged.zip", CHANGES[number % len(CHANGES)], rng)
        moved = numbers(load_run(folder)) != expected
        shutil.rmtree(folder)
        result = command("verify", path, *models, "--share", 1, "--seed", number)
        assert result.exit_code in (0, 1, 2, 3)
        assert not (moved and result.exit_code in FINE), (number, result.output)
        caught += moved
        path.unlink()
    assert caught
