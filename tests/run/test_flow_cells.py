"""Runs whose models are flows: rows, resume, precision, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import saved_model

from robbench.attacks.likelihood import noise_images
from robbench.cards import Architecture
from robbench.cli.run import run_matrix
from robbench.core.errors import UserError
from robbench.core.random import SampleRandom
from robbench.data import load_dataset
from robbench.experiments.comparison import measured_rows
from robbench.models.flows.base import unit_interval
from robbench.models.flows.glow import Glow
from robbench.models.flows.realnvp import RealNVP
from robbench.models.loading import load_flow
from robbench.models.zoo import zoo_entries
from robbench.results.likelihood import nll_tables
from robbench.results.tables import leaderboard
from robbench.run.plan import build_plan
from robbench.run.request import RunRequest
from robbench.store.ledger import load_run

GLOW = {"levels": 2, "steps": 2, "width": 8}


def tiny_glow(seed: int, shape=(1, 8, 8), levels=17):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Glow(shape, levels, **GLOW)
        model.initialize(torch.rand(64, *shape))
    return model.eval()


def flow_fields(defense: str, **changes):
    fields = {"kind": "flow", "classes": None, "grey_levels": 17, "defense": defense}
    return {**fields, "architecture": Architecture(name="glow", arguments=GLOW), **changes}


@pytest.fixture(scope="module")
def flow_zoo(tmp_path_factory, tiny_zoo) -> Path:
    folder = tmp_path_factory.mktemp("flows")
    for seed, defense in enumerate(("clean", "at")):
        saved_model(folder, f"flow-{defense}", tiny_glow(seed), **flow_fields(defense))
    other = tiny_glow(3, levels=256)
    saved_model(folder, "flow-256", other, **flow_fields("clean", grey_levels=256, dataset="digits"))
    (folder / "tiny-a").symlink_to(tiny_zoo / "tiny-a")
    return folder


def request(zoo: Path, **changes) -> RunRequest:
    defaults = {"attacks": ("nll-in", "noise"), "models": ("flow-clean",), "steps": (3,), "n": 40, "zoo": zoo}
    return RunRequest(**{**defaults, **changes})


def rows_of(folder: Path) -> dict[tuple[str, str], object]:
    run = load_run(folder)
    return {(result.cell.model, result.cell.attack.label): result for result in run.cells}


def test_rows_follow_from_the_stored_images(flow_zoo, tmp_path):
    asked = request(flow_zoo, attacks=("nll-in", "nll-out", "noise"), epsilons=(0.0, 32.0), keep_examples=40)
    assert run_matrix(asked, tmp_path) == 0
    flow, test = load_flow(zoo_entries(flow_zoo)["flow-clean"]), load_dataset("digits").test
    cells = rows_of(tmp_path)
    assert {label for _, label in cells} == {
        f"{name}@{epsilon}{steps}"
        for name, steps in (("nll-in", "@3steps"), ("nll-out", "@3steps"), ("noise", ""))
        for epsilon in (0, 32)
    }
    for (_, label), result in cells.items():
        rows = result.rows
        ids = rows["sample_id"].to_numpy()
        images = {
            name: np.stack([np.frombuffer(b, "<f4").reshape(1, 8, 8) for b in rows[name]])
            for name in ("original", "example")
        }
        wanted, labels = test.by_ids(ids.tolist())
        if label.startswith("nll-out"):
            wanted = noise_images(0, torch.tensor(ids), (1, 8, 8), 17)
        np.testing.assert_array_equal(images["original"], wanted.numpy())
        np.testing.assert_array_equal(rows["label"], labels.numpy())
        moved = np.abs(images["example"] - images["original"]).reshape(len(ids), -1).max(1)
        np.testing.assert_allclose(rows["linf"], moved, atol=1e-7)
        assert moved.max() <= (32 / 255 if "@32" in label else 0) + 1e-6
        for column, name in (("nll_before", "original"), ("nll_after", "example")):
            bits = flow.bits_per_dim(torch.tensor(images[name]), None, seed=0, sample_ids=ids.tolist())
            np.testing.assert_allclose(rows[column], bits.double().numpy(), rtol=1e-5)


def test_resume_and_larger_n_reuse_rows(flow_zoo, tmp_path):
    run_matrix(request(flow_zoo, n=130), tmp_path / "grown")
    first = {p.name: p.read_bytes() for p in (tmp_path / "grown").rglob("shard-*.parquet")}
    run_matrix(request(flow_zoo, n=200), tmp_path / "grown")
    run_matrix(request(flow_zoo, n=200, batch_size=31), tmp_path / "whole")
    kept = {p.name: p.read_bytes() for p in (tmp_path / "grown").rglob("shard-*.parquet")}
    assert all(kept[name] == content for name, content in first.items())
    grown, whole = rows_of(tmp_path / "grown"), rows_of(tmp_path / "whole")
    for key, result in grown.items():
        assert len(result.rows) == 200
        np.testing.assert_array_equal(result.rows["sample_id"], whole[key].rows["sample_id"])
        np.testing.assert_allclose(result.rows["nll_after"], whole[key].rows["nll_after"], rtol=1e-4)


def test_float64_scores_are_cells_of_their_own(flow_zoo, tmp_path):
    hashes = {
        dtype: [cell.record.hash for cell in build_plan(request(flow_zoo, likelihood_dtype=dtype)).cells]
        for dtype in (None, "float32", "float64")
    }
    assert hashes[None] == hashes["float32"]
    assert not set(hashes[None]) & set(hashes["float64"])
    run_matrix(request(flow_zoo, likelihood_dtype="float64", epsilons=(0.0,)), tmp_path)
    result = rows_of(tmp_path)["flow-clean", "nll-in@0@3steps"]
    assert result.cell.precision == "fp64"
    values = result.rows["nll_after"].to_numpy()
    assert (values != values.astype(np.float32)).any()


def test_importance_weighted_scores_are_cells_of_their_own(flow_zoo, tmp_path):
    hashes = {
        draws: [cell.record.hash for cell in build_plan(request(flow_zoo, likelihood_draws=draws)).cells]
        for draws in (None, 1, 2, 8)
    }
    assert hashes[None] == hashes[1], "the default keeps the address of the cells that are there"
    assert not set(hashes[None]) & set(hashes[8])
    assert not set(hashes[2]) & set(hashes[8])


def test_importance_weighted_rows_average_densities_and_have_names_of_their_own(flow_zoo, tmp_path):
    """Oracle: the mean density over the same eight draws of the noise, in float64, sample by sample."""
    draws, seed = 8, 0
    asked = request(flow_zoo, epsilons=(0.0,), attacks=("nll-in",), likelihood_draws=draws, seed=seed)
    run_matrix(asked, tmp_path)
    result = rows_of(tmp_path)["flow-clean", "nll-in@0@3steps@8draws"]
    flow = load_flow(zoo_entries(flow_zoo)["flow-clean"])
    rows = result.rows.sort_values("sample_id")
    ids = rows["sample_id"].tolist()
    x, _ = load_dataset("digits").test.by_ids(ids)
    noise = SampleRandom(seed, "dequantization")
    with torch.no_grad():
        nats = torch.stack(
            [flow.log_prob(x, None, noise.draw(ids, x.shape[1:], unit_interval, k)) for k in range(draws)]
        ).double()
    mean = nats.max(0).values + (nats - nats.max(0).values).exp().mean(0).log()
    np.testing.assert_allclose(rows["nll_before"], -mean / (64 * np.log(2)), rtol=1e-5)
    table = leaderboard(load_run(tmp_path))
    metric = "importance_weighted_bits_per_dim"
    assert {row.metric for row in table if "bits" in row.metric} == {
        metric,
        f"{metric}_median",
        f"{metric}_before",
    }
    (after,) = [row for row in table if row.metric == metric]
    values = rows["nll_after"].to_numpy()
    half = 1.959963984540054 * values.std(ddof=1) / len(values) ** 0.5
    assert (after.value, after.upper) == (pytest.approx(values.mean()), pytest.approx(values.mean() + half))
    assert "importance-weighted over 8 noise draws" in after.note
    (nll,) = nll_tables(load_run(tmp_path))
    assert nll.attack == "nll-in@8draws"


def test_two_estimates_never_share_a_table(flow_zoo, tmp_path):
    """In a merged run the budgets are the same and the quantities are not."""
    for name, draws in (("one", None), ("eight", 8)):
        asked = request(flow_zoo, epsilons=(32.0,), attacks=("noise",), steps=(), likelihood_draws=draws)
        run_matrix(asked, tmp_path / name)
    one, eight = (load_run(tmp_path / name) for name in ("one", "eight"))
    tables = nll_tables(replace(one, cells=[*eight.cells, *one.cells]))
    means = {table.attack: table.lines[-1].cells[0].mean for table in tables}
    assert means == {
        "noise": pytest.approx(one.cells[0].rows["nll_after"].mean()),
        "noise@8draws": pytest.approx(eight.cells[0].rows["nll_after"].mean()),
    }
    assert means["noise@8draws"] < means["noise"]
    published = [m for m in measured_rows(eight) if m.attack == "clean" and m.row.epsilon is None]
    assert [(m.row.metric, m.draws) for m in published] == [("importance_weighted_bits_per_dim", 8)]


def test_a_run_may_hold_classifiers_and_flows(flow_zoo, tmp_path):
    asked = request(
        flow_zoo, attacks=("pgd10", "noise"), models=("tiny-a", "flow-clean"), steps=(), flow="flow-clean"
    )
    assert run_matrix(asked, tmp_path) == 0
    assert set(rows_of(tmp_path)) == {("tiny-a", "pgd10"), ("flow-clean", "noise")}


def test_defenses_name_models_of_the_attacked_kind(flow_zoo):
    plan = build_plan(request(flow_zoo, models=(), defenses=("at",)))
    assert {cell.record.model for cell in plan.cells} >= {"flow-at"}
    assert all(plan.cards[cell.record.model].kind == "flow" for cell in plan.cells)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ("tiny-a",)}, ["'nll-in'", "likelihood", "tiny-a"]),
        ({"attacks": ("pgd20",), "steps": ()}, ["'pgd20'", "classifier", "flow-clean"]),
        ({"models": ("flow-clean", "tiny-a")}, ["'tiny-a'", "classifier", "pgd20,aa"]),
        ({"attacks": ("pgd20", "noise"), "steps": (), "models": ("tiny-a", "tiny-a")}, ["'noise'", "flow"]),
        ({"models": ("flow-256",)}, ["flow-256", "256", "17"]),
        ({"models": ("digits-glows",)}, ["digits-glows", "digits-glow"]),
        ({"epsilons": (0.03,)}, ["0.03", "0..255", "7.65"]),
        ({"etas": (1.0,)}, ["--eta", "latent"]),
        ({"attacks": ("noise",)}, ["--steps", "iterative"]),
        ({"flow": "flow-clean"}, ["--flow", "--model"]),
        ({"models": (), "defenses": ("ijsat",)}, ["'ijsat'", "no flow"]),
        ({"dataset": "fashionmnist", "n": 1}, ["flow-clean", "digits", "fashionmnist"]),
        (
            {"attacks": ("pgd20",), "models": ("tiny-a",), "steps": (), "likelihood_dtype": "float64"},
            ["--likelihood-dtype", "float64"],
        ),
        (
            {"attacks": ("pgd20",), "models": ("tiny-a",), "steps": (), "likelihood_draws": 8},
            ["--likelihood-draws", "8"],
        ),
    ],
)
def test_refusals_name_the_argument_and_the_next_step(flow_zoo, tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        run_matrix(request(flow_zoo, **changes), tmp_path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


def test_a_singular_convolution_is_refused(tmp_path):
    model = tiny_glow(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("log_diagonal"):
                tensor.fill_(float("-inf"))
    saved_model(tmp_path, "singular", model, **flow_fields("clean"))
    with pytest.raises(UserError, match=r"singular|invert|infinit|NaN|golden"):
        build_plan(request(tmp_path, models=("singular",)))


def test_a_flow_without_any_finite_likelihood_is_refused(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RealNVP((1, 8, 8), 17, scales=2, width=4, blocks=1)
        model.initialize(torch.rand(32, 1, 8, 8))
    architecture = Architecture(name="realnvp", arguments={"scales": 2, "width": 4, "blocks": 1})
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("scale"):
                tensor.fill_(1e30)
    saved_model(tmp_path, "wild", model, **flow_fields("clean", architecture=architecture))
    with pytest.raises(UserError, match="wild"):
        build_plan(request(tmp_path, models=("wild",)))
