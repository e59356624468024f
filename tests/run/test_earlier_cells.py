"""A second run into a folder: the first stays in the tables where it is on the same samples, else a line says so."""

import json
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from tiny_models import saved_model, trained_classifier

from robbench.cli.app import main
from robbench.results.reproduce import commands
from robbench.store.ledger import load_run


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run(zoo: Path, out: Path, model: str, attacks: str, *more: object, n: int = 20) -> str:
    options = (
        "--zoo",
        zoo,
        "--out",
        out,
        "--model",
        model,
        "--attacks",
        attacks,
        "--n",
        n,
        "--device",
        "cpu",
    )
    result = invoked("run", *options, *more)
    assert result.exit_code == 0, result.stderr
    return result.output


def cells(folder: Path) -> list[tuple[str, str]]:
    return [(one.cell.model, one.cell.attack.label) for one in load_run(folder).cells]


def rows_of(folder: Path) -> dict[tuple[str, str], pd.DataFrame]:
    return {
        (one.cell.model, one.cell.attack.label): one.rows.reset_index(drop=True)
        for one in load_run(folder).cells
    }


@pytest.fixture(scope="module")
def two_runs(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-a under pgd10, then tiny-b under fgsm and tiny-a under fgsm-l2. Read only."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run(tiny_zoo, folder, "tiny-a", "pgd10")
    run(tiny_zoo, folder, "tiny-b", "fgsm")
    run(tiny_zoo, folder, "tiny-a", "fgsm-l2")
    return folder


def test_every_cell_on_the_same_samples_is_in_the_tables(two_runs: Path) -> None:
    assert cells(two_runs) == [("tiny-a", "pgd10"), ("tiny-a", "fgsm-l2"), ("tiny-b", "fgsm")]
    csv = pd.read_csv(two_runs / "leaderboard.csv")
    shown = csv[(csv.metric == "accuracy") & (csv.attack != "clean")]
    assert {*zip(shown.model, shown.attack, strict=True)} == {*cells(two_runs)}
    worst = csv[(csv.attack == "worst-case") & (csv.threat_model == "all")]
    assert {*worst.status} == {"partial"}, "no model saw every attack"


def test_what_is_left_out_is_said(two_runs: Path, tiny_zoo: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_runs, tmp_path / "run"))
    output = run(tiny_zoo, folder, "tiny-b", "pgd10", n=10)
    assert "Not in these tables: 3 earlier cells" in output
    assert "tiny-a x pgd10" in output
    assert "with another --out" in output
    assert cells(folder) == [("tiny-b", "pgd10")]
    output = run(tiny_zoo, folder, "tiny-b", "fgsm")
    assert len(cells(folder)) == 3, "the cells of before are on the same samples again"
    assert "1 earlier cell of" in output
    assert "tiny-b x pgd10" in output
    output = run(tiny_zoo, folder, "tiny-b", "fgsm", "--fresh")
    assert "Not in these tables" in output
    assert ("tiny-b", "fgsm") in cells(folder)


def test_another_model_of_the_same_name_is_no_row_of_the_same_table(tmp_path: Path) -> None:
    """One row made of two models would be a wrong number."""
    zoo, out = tmp_path / "zoo", tmp_path / "run"
    saved_model(zoo, "mine", trained_classifier(0, epochs=1))
    run(zoo, out, "mine", "pgd10")
    shutil.rmtree(zoo / "mine")
    saved_model(zoo, "mine", trained_classifier(1, epochs=1))
    output = run(zoo, out, "mine", "fgsm")
    assert "1 earlier cell" in output
    assert "mine x pgd10" in output
    assert cells(out) == [("mine", "fgsm")]


@pytest.mark.parametrize("damage", ["record", "shard", "card", "running"])
def test_damaged_cells_are_left_out(damage: str, two_runs: Path, tiny_zoo: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_runs, tmp_path / "run"))
    victim = next(one.cell for one in load_run(folder).cells if one.cell.attack.label == "fgsm")
    place = folder / "cells" / victim.hash[:16]
    if damage == "record":
        (place / "cell.json").write_text("{", encoding="utf-8")
    elif damage == "shard":
        next(place.glob("shard-*")).write_bytes(b"x")
    elif damage == "card":
        (folder / "cards" / "tiny-b.yaml").unlink()
    else:
        next(place.glob("shard-*")).unlink()
    output = run(tiny_zoo, folder, "tiny-a", "fgsm")
    assert ("tiny-b", "fgsm") not in cells(folder)
    assert "Not in these tables: 1 earlier cell" in output
    assert ("tiny-b x fgsm" if damage != "record" else place.name) in output


def test_the_commands_beside_the_tables_compute_the_same_rows(two_runs: Path, in_tmp: Path) -> None:
    again = in_tmp / "again"
    lines = commands(load_run(two_runs))
    assert len(lines) == 2, "one a model: they were attacked differently"
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["robbench", "run"]
        assert invoked(*words[1:], "--out", again).exit_code == 0
    before, after = rows_of(two_runs), rows_of(again)
    assert before.keys() == after.keys()
    for key, rows in before.items():
        pd.testing.assert_frame_equal(rows, after[key])


def test_commands_name_models_and_places_as_they_were_given(in_tmp: Path) -> None:
    """Paths with what a shell would act on, in a page and in the line that computes it again."""
    zoo = in_tmp / "my models; $(rm)"
    saved_model(zoo, "tiny", trained_classifier(0, epochs=1))
    given = f"{zoo.name}/tiny"
    options = ("--threat-models", "mine", "--dataset", "digits", "--model", given, "--attacks", "quick")
    (in_tmp / "mine").mkdir()
    (in_tmp / "mine" / "quick.yaml").write_text(
        "{name: quick, space: image, norm: linf, description: d, budgets: {digits: {epsilon: 0.1}}, "
        "attacks: {quick: {algorithm: pgd, parameters: {steps: 1}}}}",
        encoding="utf-8",
    )
    assert invoked("run", *options, "--n", 10, "--out", "one").exit_code == 0
    (line,) = commands(load_run(Path("one")))
    words = shlex.split(line)
    assert given in words
    assert "--threat-models=mine" in words
    assert shlex.quote(given) in (in_tmp / "one" / "leaderboard.html").read_text("utf-8").replace(
        "&#39;", "'"
    )
    assert invoked(*words[1:], "--out", "two").exit_code == 0
    pd.testing.assert_frame_equal(
        rows_of(Path("one"))["tiny", "quick"], rows_of(Path("two"))["tiny", "quick"]
    )

    exported = invoked("export", "one", "-o", "one.zip", "--threat-models", "mine")
    assert exported.exit_code == 0, exported.stderr
    assert given.encode() not in (in_tmp / "one.zip").read_bytes(), "bundles hold no paths of this machine"
    record = next((in_tmp / "one" / "cells").glob("*/cell.json"))
    assert json.loads(record.read_text(encoding="utf-8"))["model_hash"]
