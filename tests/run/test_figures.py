"""Figures of a run's models: numbers against independent computations, pictures against numbers, and wrong use."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_models import saved_model

from robbench.cards import Architecture
from robbench.cli.app import main
from robbench.data import load_dataset
from robbench.models.classifiers import ARCHITECTURES
from robbench.report.figures import _embedding, _surface, draw, draw_file
from robbench.report.site.build import parts
from robbench.report.site.groups import site_of
from robbench.report.site.page import Download, Page
from robbench.run.embedding import projection
from robbench.run.figures import compute_figures
from robbench.run.subjects import FigureRequest
from robbench.store.figure_records import FigureRecord, read_figures
from robbench.store.ledger import load_run

N, POINTS = 14, 5


def network(embedding: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(embedding)
        return ARCHITECTURES.get("er-digits")((1, 8, 8), 10, embedding=embedding, width=0.05).eval()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for size in (2, 5):
        arguments = {"embedding": size, "width": 0.05}
        architecture = Architecture(name="er-digits", arguments=arguments)
        saved_model(folder, f"plane-{size}", network(size), architecture=architecture)
    return folder


@pytest.fixture(scope="module")
def run(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures") / "run"
    words = [
        "run",
        "--dataset",
        "digits",
        "--model",
        "plane-2,plane-5",
        "--zoo",
        str(zoo),
        "--attacks",
        "fgsm",
    ]
    words += ["--n", str(N), "--keep-examples", "all", "--out", str(folder)]
    assert CliRunner().invoke(main, words).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def figures(run: Path, zoo: Path) -> dict[tuple[str, str], FigureRecord]:
    """Every figure, computed through the command line."""
    for name in ("embedding", "loss-surface"):
        words = ["figure", name, str(run), "--zoo", str(zoo), "--points", str(POINTS)]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    return {(record.figure, record.model): record for record in read_figures([run])}


def samples(run: Path) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    ids = sorted(load_run(run).sample_ids)
    return ids, *load_dataset("digits").test.by_ids(ids)


def test_the_surface_at_zero_is_the_clean_loss(
    run: Path, figures: dict[tuple[str, str], FigureRecord]
) -> None:
    _, x, y = samples(run)
    for size in (2, 5):
        record = figures["loss-surface", f"plane-{size}"]
        found = {(a, b): loss for a, b, loss in record.rows}
        with torch.no_grad():
            expected = float(torch.nn.functional.cross_entropy(network(size)(x), y))
        assert found[0.0, 0.0] == pytest.approx(expected, rel=1e-5)
        assert len(found) == POINTS**2
        assert record.n == N


def test_the_surface_is_the_loss_at_every_step(
    run: Path, figures: dict[tuple[str, str], FigureRecord]
) -> None:
    """Along the sign of the gradient, which plain autograd gives, on the line where the random step is 0."""
    _, x, y = samples(run)
    model, point = network(5), x.clone().requires_grad_(True)
    torch.nn.functional.cross_entropy(model(point), y).backward()
    assert point.grad is not None
    extent = load_run(run).cells[0].cell.attack.epsilon
    record = figures["loss-surface", "plane-5"]
    line = {a: loss for a, b, loss in record.rows if b == 0}
    assert max(line) == extent
    for a, loss in line.items():
        moved = (x + float(a) * point.grad.sign()).clamp(0, 1)
        with torch.no_grad():
            expected = float(torch.nn.functional.cross_entropy(model(moved), y))
        assert loss == pytest.approx(expected, rel=1e-5)


def test_two_dimensions_are_shown_as_they_are(
    run: Path, figures: dict[tuple[str, str], FigureRecord]
) -> None:
    ids, x, y = samples(run)
    record = figures["embedding", "plane-2"]
    clean = [row for row in record.rows if row[0] == "clean"]
    assert [row[1] for row in clean] == ids
    assert [row[2] for row in clean] == y.tolist()
    with torch.no_grad():
        model = network(2)
        expected = model.encoder(x)
        assert [row[3] for row in clean] == model(x).argmax(1).tolist()
    np.testing.assert_allclose([row[4:] for row in clean], expected, rtol=1e-5, atol=1e-6)
    assert {row[0] for row in record.rows} == {"clean", "fgsm"}
    assert len(record.rows) == 2 * N
    assert "shown as they are" in record.facts[0]


def test_more_dimensions_are_shown_by_the_components_of_a_singular_value_decomposition() -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(40, 6)) * [5, 4, 3, 2, 1, 0.5]
    project, words = projection(points)
    centred = points - points.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    others = generator.normal(size=(7, 6))
    expected = (others - points.mean(0)) @ directions[:2].T
    found = project(others)
    np.testing.assert_allclose(found * np.sign(found[0] / expected[0]), expected, atol=1e-9)
    share = 100 * (sizes[:2] ** 2).sum() / (sizes**2).sum()
    assert f"{share:.1f} % of their variance" in words


def test_one_dimension_and_equal_points_can_be_drawn() -> None:
    project, _ = projection(np.arange(4.0)[:, None])
    np.testing.assert_array_equal(project(np.array([[3.0]])), [[3.0, 0.0]])
    project, words = projection(np.ones((5, 4)))
    assert np.isfinite(project(np.ones((1, 4)))).all()
    assert "0.0 % of their variance" in words


def test_pictures_have_the_numbers_of_the_files(
    run: Path, figures: dict[tuple[str, str], FigureRecord]
) -> None:
    for (name, _), record in figures.items():
        (path,) = (run / "figures").glob(f"{name}-{record.model_hash[:16]}.csv")
        with path.open(newline="") as stream:
            header, *lines = csv.reader(stream)
        assert tuple(header) == record.columns
        assert [[str(value) for value in row] for row in record.rows] == lines
        svg = path.with_suffix(".svg").read_text()
        assert svg == draw_file(record)
        assert "var(" not in svg
        assert "currentColor" not in svg
    record = figures["loss-surface", "plane-5"]
    (mesh,) = [c for c in _surface(record).axes[0].collections if type(c).__name__ == "QuadMesh"]
    np.testing.assert_array_equal(np.asarray(mesh.get_array()).flatten(), record.numbers("loss"))
    record = figures["embedding", "plane-5"]
    drawn = [point for axes in _embedding(record).axes for line in axes.lines for point in line.get_xydata()]
    assert sorted(map(tuple, drawn)) == sorted(zip(record.numbers("x"), record.numbers("y"), strict=True))
    assert len(re.findall("<use ", draw(record, "p"))) >= len(record.rows)


def test_the_page_of_the_model_shows_them_with_downloads(
    run: Path, figures: dict[tuple[str, str], FigureRecord]
) -> None:
    found = list(parts(site_of([load_run(run)])))
    page = next(p for p in found if isinstance(p, Page) and p.path.endswith("model-plane-5.html"))
    assert draw(figures["loss-surface", "plane-5"], "loss-surface") in page.body
    assert "two principal components of the clean images" in page.body
    files = {p.path.rpartition("/")[2]: p.content for p in found if isinstance(p, Download)}
    for name in ("embedding", "loss-surface"):
        (own,) = (run / "figures").glob(f"{name}-{figures[name, 'plane-5'].model_hash[:16]}.csv")
        assert files[f"model-plane-5-{name}.csv"] == own.read_bytes()
        assert f"downloads/model-plane-5-{name}.csv" in page.body


def test_figures_of_a_model_that_is_no_encoder_take_its_last_hidden_layer(tmp_path: Path) -> None:
    from tiny_models import trained_classifier

    saved_model(tmp_path / "zoo", "plain", trained_classifier(0, epochs=1))
    words = [
        "run",
        "--dataset",
        "digits",
        "--model",
        "plain",
        "--zoo",
        str(tmp_path / "zoo"),
        "--attacks",
        "fgsm",
    ]
    words += ["--n", "5", "--out", str(tmp_path / "run")]
    assert CliRunner().invoke(main, words).exit_code == 0
    (record,) = compute_figures(tmp_path / "run", "Embedding", FigureRequest(zoo=tmp_path / "zoo", n=4))
    assert (record.n, len(record.rows)) == (4, 8)
    assert ":input" in record.facts[0]


def test_an_edited_figure_is_refused(run: Path, zoo: Path, tmp_path: Path) -> None:
    from shutil import copytree

    copy = copytree(run, tmp_path / "run")
    list(compute_figures(copy, "embedding", FigureRequest(models=("plane-2",), zoo=zoo)))
    path = sorted((copy / "figures").glob("embedding-*.json"))[0]
    content = json.loads(path.read_text())
    content["rows"][0][4] += 1.0
    path.write_text(json.dumps(content))
    result = CliRunner().invoke(main, ["report", str(copy), "--out", str(tmp_path / "site")])
    assert result.exit_code == 2
    assert "run robbench figure again" in result.output
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["loss-surfaces"], "did you mean 'loss-surface'"),
        (["loss-surface", "--points", "4"], "odd number"),
        (["loss-surface", "--extent", "0"], "not in (0, 1]"),
        (["loss-surface", "--model", "plane-3"], "did you mean"),
        (["embedding", "--attacks", "pgd20"], "pgd20"),
        (["embedding", "--n", "2"], "at least 3"),
    ],
)
def test_wrong_use_is_one_line(run: Path, zoo: Path, words: list[str], expected: str) -> None:
    result = CliRunner().invoke(main, ["figure", words[0], str(run), "--zoo", str(zoo), *words[1:]])
    assert (result.exit_code, expected in result.output) == (2, True), result.output
    assert "Traceback" not in result.output


def test_another_model_of_the_name_is_refused(run: Path, tmp_path: Path) -> None:
    words = ["figure", "embedding", str(run), "--model", "plane-2"]
    assert "is not in the zoo" in CliRunner().invoke(main, words).output
    architecture = Architecture(name="er-digits", arguments={"embedding": 2, "width": 0.05})
    saved_model(tmp_path, "plane-2", network(2).apply(_shifted), architecture=architecture)
    result = CliRunner().invoke(main, [*words, "--zoo", str(tmp_path)])
    assert result.exit_code == 2
    assert "is another model than the run's 'plane-2'" in result.output


def _shifted(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        with torch.no_grad():
            module.weight += 0.1


def test_a_run_without_images_says_how_to_keep_them(run: Path, zoo: Path, tmp_path: Path) -> None:
    from shutil import copytree

    copy = copytree(run, tmp_path / "run")
    (copy / "originals.npz").unlink()
    result = CliRunner().invoke(main, ["figure", "embedding", str(copy), "--zoo", str(zoo)])
    assert (result.exit_code, "--keep-examples all" in result.output) == (2, True)


def test_figures_are_no_garbage(run: Path, figures: dict[tuple[str, str], FigureRecord]) -> None:
    result = CliRunner().invoke(main, ["gc", str(run), "--json"])
    (place,) = json.loads(result.output)["places"]
    assert (place["garbage"], place["left_alone"]) == ([], [])
