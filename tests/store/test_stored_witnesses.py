"""A run keeps the witness of every stored latent and joint example, and the example is decoded from it again."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from test_ledger import LATER, first_schema, stated

from robbench.attacks.codec import FlowCodec
from robbench.attacks.search.spaces import WITNESS_TOLERANCE, decode_witness
from robbench.attacks.witness import Witness
from robbench.bundle.archive import open_bundle
from robbench.bundle.examples import ExampleChoice
from robbench.bundle.export import ExportRequest, export_run
from robbench.cli.run import run_matrix
from robbench.core.errors import UserError
from robbench.core.resources import data_root
from robbench.models.loading import load_flow
from robbench.models.zoo import read_entry
from robbench.run.request import RunRequest
from robbench.store.ledger import Ledger, load_run

GLOW = read_entry(data_root() / "zoo" / "digits-glow")


def request(**changes: object) -> RunRequest:
    fields = {"attacks": ("fgsm", "jsa50", "om-pgd"), "models": ("digits-standard",), "steps": (4,)}
    fields |= {"n": 130, "keep_examples": 128, "device": "cpu"}
    return RunRequest(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an image, a joint and a latent attack with most examples kept. Read only."""
    folder = tmp_path_factory.mktemp("run")
    assert run_matrix(request(), folder) == 0
    return folder


def decoded(rows: pd.DataFrame, originals: dict[int, np.ndarray]) -> torch.Tensor:
    flow = load_flow(GLOW)
    found = [Witness.from_bytes(content) for content in rows["witness"]]
    assert [witness.condition for witness in found] == rows["label"].tolist()
    parts = {
        name: torch.from_numpy(np.stack([w.perturbations[name] for w in found]))
        for name in found[0].perturbations
    }
    x = torch.from_numpy(np.stack([originals[i] for i in rows["sample_id"]]))
    return decode_witness(FlowCodec(flow), x, torch.tensor(rows["label"].tolist()), parts).image


def images(column: pd.Series) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.frombuffer(e, "<f4").reshape(1, 8, 8) for e in column]))


@pytest.mark.parametrize("name", ["jsa50", "om-pgd"])
def test_the_example_is_decoded_from_its_witness(folder: Path, name: str) -> None:
    run = load_run(folder)
    rows = next(result.rows for result in run.cells if result.cell.attack.name == name)
    stored, with_witness = rows["example"].notna(), rows["witness"].notna()
    assert stored.sum() == 128
    assert with_witness.sum() > 100
    assert not (with_witness & ~stored).any()
    originals = Ledger(folder).originals()
    unseen = rows[stored & ~with_witness]  # the clean image was wrong: nobody searched
    assert (unseen["broken_by"] == "clean").all()
    for i, example in zip(unseen["sample_id"], unseen["example"], strict=True):
        assert example == originals[i].tobytes()
    seen = rows[with_witness]
    gap = (decoded(seen, originals) - images(seen["example"])).abs().max()
    assert gap <= WITNESS_TOLERANCE
    clean = torch.from_numpy(np.stack([originals[i] for i in seen["sample_id"]]))
    assert (images(seen["example"]) - clean).abs().amax((1, 2, 3)).min() > 10 * WITNESS_TOLERANCE
    first = Witness.from_bytes(seen["witness"].iloc[0])
    assert first.flow == GLOW.card.weights.sha256
    assert set(first.perturbations) == ({"lambda", "delta"} if name == "jsa50" else {"lambda"})


def test_image_attacks_have_none(folder: Path) -> None:
    rows = next(result.rows for result in load_run(folder).cells if result.cell.attack.name == "fgsm")
    assert rows["example"].notna().sum() == 128
    assert rows["witness"].isna().all()


def test_witnesses_travel(folder: Path, tmp_path: Path) -> None:
    manifest = export_run(ExportRequest(folder, tmp_path / "x.zip", ExampleChoice.parse("8")))
    assert (manifest.examples.stored, manifest.examples.exported) == (384, 24)
    before = load_run(folder)
    with open_bundle(tmp_path / "x.zip") as bundle:
        assert bundle.manifest.flows == {"digits-glow": GLOW.card.weights.sha256}
        for mine, its in zip(before.cells, bundle.run.cells, strict=True):
            there = its.rows["example"].notna()
            assert there.sum() == 8
            for name in ("example", "witness"):
                assert mine.rows[name][there].tolist() == its.rows[name][there].tolist()


def small(tmp_path: Path) -> list[Path]:
    """A run of one joint attack on two shards; their paths."""
    run_matrix(request(attacks=("jsa50",), n=124, steps=(2,)), tmp_path)
    return sorted(tmp_path.glob("cells/*/shard-*"))


def test_a_resumed_run_may_mix_schemas(tmp_path: Path) -> None:
    first, second = small(tmp_path)
    before = load_run(tmp_path).cells[0].rows
    first_schema(first)
    old = first.read_bytes()
    second.unlink()
    assert run_matrix(request(attacks=("jsa50",), n=124, steps=(2,)), tmp_path) == 0
    assert first.read_bytes() == old
    assert not (tmp_path / "quarantine").exists()
    after = load_run(tmp_path).cells[0].rows
    pd.testing.assert_frame_equal(before.drop(columns=LATER), after.drop(columns=LATER))
    assert 0 < after["witness"].notna().sum() < before["witness"].notna().sum()
    export_run(ExportRequest(tmp_path, tmp_path / "x.zip", ExampleChoice.parse("all")))
    with open_bundle(tmp_path / "x.zip") as bundle:
        pd.testing.assert_frame_equal(bundle.run.cells[0].rows, after)


def test_a_newer_shard_is_never_computed_over(tmp_path: Path) -> None:
    first, _ = small(tmp_path)
    table = pq.read_table(first)
    pq.write_table(stated(table, b"5", writer=b"9.0.0"), first)
    content = first.read_bytes()
    with pytest.raises(UserError, match=r"ledger schema 5.; robbench >= 9\.0\.0 can read it"):
        run_matrix(request(attacks=("jsa50",), n=124, steps=(2,)), tmp_path)
    with pytest.raises(UserError, match=r"robbench >= 9\.0\.0 can read it"):
        load_run(tmp_path)
    assert first.read_bytes() == content
    assert not (tmp_path / "quarantine").exists()
