"""Whole runs of the matrix on a tiny zoo: resume, reuse, quarantine, failures, a real kill."""

import json
import shutil
import signal
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from processes import Command, finished, started

from robbench.attacks.pgd import ProjectedGradientDescent
from robbench.cli.run import dry_run_table, run_matrix
from robbench.core.errors import AttackViolation, UserError
from robbench.core.terminal import Terminal
from robbench.report.files import write_report
from robbench.run.request import RunRequest
from robbench.store.ledger import Ledger, load_run

SLOW = """
name: slow
space: image
norm: linf
description: PGD that takes long enough to be killed.
budgets: {digits: {epsilon: 0.03}}
attacks:
  slow-pgd: {algorithm: pgd, parameters: {steps: 80, restarts: 2}}
"""
N = 130  # two blocks of samples
TABLES = ("leaderboard.csv", "leaderboard-wide.csv", "leaderboard.md")


def request(tiny_zoo: Path, **changes: object) -> RunRequest:
    fields = {"attacks": ("fgsm", "pgd10"), "models": ("tiny-a",), "zoo": tiny_zoo, "n": N, "device": "cpu"}
    return RunRequest(**(fields | changes))  # type: ignore[arg-type]


def shards(folder: Path) -> dict[Path, tuple[int, int]]:
    """(inode, mtime) of every shard: unchanged means untouched."""
    stats = {path: path.stat() for path in sorted(folder.glob("cells/*/shard-*.parquet"))}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


@pytest.fixture(scope="module")
def finished_run(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `request`, all done. Read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_matrix(request(tiny_zoo), folder) == 0
    return folder


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of it, times of files included."""
    return Path(shutil.copytree(finished_run, tmp_path / "finished"))


def test_rows_are_what_the_attack_did(tiny_zoo: Path, tmp_path: Path) -> None:
    """Rows against a direct call of the attack on the same samples."""
    from robbench.attacks import Victim, build_attack
    from robbench.data import load_dataset
    from robbench.models.loading import load_model
    from robbench.models.zoo import read_entry
    from robbench.specs import resolve_attack, threat_models

    assert run_matrix(request(tiny_zoo, attacks=("pgd10",), n=100, epsilons=(0.05,)), tmp_path) == 0
    rows = load_run(tmp_path).cells[0].rows
    x, y = load_dataset("digits").test.by_ids(rows["sample_id"].tolist())
    model = load_model(read_entry(tiny_zoo / "tiny-a"))
    attack = build_attack(resolve_attack("pgd10", "digits", threat_models(), epsilon=0.05))
    outcome = attack.evaluate(Victim(model.module), torch.tensor(rows["sample_id"].tolist()), x, y, 0, 256)
    assert 0 < outcome.robust.sum() < 100
    assert rows["label"].tolist() == y.tolist()
    assert rows["robust"].tolist() == outcome.robust.tolist()
    assert rows["prediction"].tolist() == outcome.predictions.tolist()
    assert rows["linf"].tolist() == pytest.approx(outcome.linf.tolist(), abs=1e-6)
    assert rows["margin"].tolist() == pytest.approx(outcome.margins.tolist(), abs=1e-4)
    kept = rows["example"].notna()
    assert kept.sum() == 16
    stored = torch.stack([torch.frombuffer(bytearray(e), dtype=torch.float32) for e in rows["example"][kept]])
    torch.testing.assert_close(
        stored.reshape(-1, 1, 8, 8), outcome.adversarial[torch.tensor(kept.tolist())], atol=1e-5, rtol=0
    )


def test_resume_computes_only_what_is_missing(tiny_zoo: Path, run_folder: Path) -> None:
    before, expected = shards(run_folder), tables(run_folder)
    assert len(before) == 2 * 2
    lost = list(before)[1]
    lost.unlink()
    run_matrix(request(tiny_zoo), run_folder)
    after = shards(run_folder)
    assert {path for path in before if after[path] != before[path]} == {lost}
    assert tables(run_folder) == expected


def test_larger_n_reuses_work(tiny_zoo: Path, tmp_path: Path) -> None:
    run_matrix(request(tiny_zoo, n=100), tmp_path / "grown")
    before = shards(tmp_path / "grown")
    run_matrix(request(tiny_zoo, n=250), tmp_path / "grown")
    after = shards(tmp_path / "grown")
    assert {path: after[path] for path in before} == before
    new = [pq.read_metadata(path).num_rows for path in after if path not in before]
    assert sorted(new) == 2 * [10] + 2 * [20] + 2 * [120]
    run_matrix(request(tiny_zoo, n=250), tmp_path / "at-once")
    assert _verdicts(tmp_path / "grown").equals(_verdicts(tmp_path / "at-once"))
    run_matrix(request(tiny_zoo, n=100), tmp_path / "grown")
    assert shards(tmp_path / "grown") == after
    assert {len(cell.rows) for cell in load_run(tmp_path / "grown").cells} == {100}


QUICK_AA = """
name: quick
space: image
norm: linf
description: A short AutoAttack, whose noise depends on the batch.
budgets: {digits: {epsilon: 0.1}}
attacks:
  quick-aa: {algorithm: autoattack-reference, parameters: {components: [apgd-ce], iterations: 3}}
"""


def test_attacks_whose_results_depend_on_the_batch_are_computed_in_whole_blocks(
    tiny_zoo: Path, tmp_path: Path
) -> None:
    """Grown from 100 to 250 samples or computed at once: the same verdicts; the part-filled block is put aside."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "quick.yaml").write_text(QUICK_AA)
    changes = {"attacks": ("quick-aa",), "threat_models": models}
    run_matrix(request(tiny_zoo, n=100, **changes), tmp_path / "grown")
    run_matrix(request(tiny_zoo, n=250, **changes), tmp_path / "grown")
    run_matrix(request(tiny_zoo, n=250, **changes), tmp_path / "at-once")
    assert tables(tmp_path / "grown")["leaderboard.csv"] == tables(tmp_path / "at-once")["leaderboard.csv"]
    assert len(list((tmp_path / "grown").glob("superseded-1/cells/*/shard-*.parquet"))) == 1
    before = shards(tmp_path / "grown")
    run_matrix(request(tiny_zoo, n=250, **changes), tmp_path / "grown")
    assert shards(tmp_path / "grown") == before
    run_matrix(request(tiny_zoo, n=250, batch_size=50, **changes), tmp_path / "grown")
    assert len(shards(tmp_path / "grown")) == 2 * len(before), "another batch size is another cell"


def _verdicts(folder: Path) -> pd.DataFrame:
    """Verdicts of a run, near ties left out: another batch shape may round them to the other side."""
    columns = ["sample_id", "robust", "prediction"]
    frames = [cell.rows[cell.rows["margin"].abs() > 1e-4][columns] for cell in load_run(folder).cells]
    return pd.concat(frames, ignore_index=True)


def test_damaged_and_foreign_shards_are_quarantined(
    tiny_zoo: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tables(run_folder)
    first, second, third, fourth = shards(run_folder)
    first.write_bytes(first.read_bytes()[:-20])
    shutil.copy(fourth, second)
    third.write_text("not parquet")
    capsys.readouterr()
    assert run_matrix(request(tiny_zoo), run_folder) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Quarantined")]
    assert len(lines) == 3
    assert [name in line for name, line in zip((first.name, second.name, third.name), lines, strict=True)]
    assert len(list((run_folder / "quarantine").iterdir())) == 3
    assert tables(run_folder) == expected


def test_report_refuses_a_damaged_shard_and_says_what_to_do(run_folder: Path) -> None:
    path = next(iter(shards(run_folder)))
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"{path.name}.*run the same"):
        write_report([load_run(run_folder)], Terminal())
    assert path.exists()


def test_cells_name_the_device_that_computed_them(tiny_zoo: Path, run_folder: Path) -> None:
    assert {cell.cell.device for cell in load_run(run_folder).cells} == {"cpu"}
    for cell in load_run(run_folder).cells:
        Ledger(run_folder).write_cell(cell.cell.model_copy(update={"device": "NVIDIA H200"}))
    run_matrix(request(tiny_zoo), run_folder)
    assert {cell.cell.device for cell in load_run(run_folder).cells} == {"NVIDIA H200"}, (
        "nothing was computed"
    )
    run_matrix(request(tiny_zoo, n=N + 10), run_folder)
    assert {cell.cell.device for cell in load_run(run_folder).cells} == {"NVIDIA H200, cpu"}


def test_a_record_of_before_there_were_devices_is_read(run_folder: Path) -> None:
    for path in run_folder.glob("cells/*/cell.json"):
        record = json.loads(path.read_text()) | {"schema_version": 1}
        del record["device"], record["sha256"]
        path.write_text(json.dumps(record))
    assert {cell.cell.device for cell in load_run(run_folder).cells} == {""}


def test_report_needs_no_model_and_no_data(tiny_zoo: Path, tmp_path: Path) -> None:
    zoo = shutil.copytree(tiny_zoo, tmp_path / "zoo")
    run_matrix(request(zoo, n=20), tmp_path / "run")
    expected, page = tables(tmp_path / "run"), (tmp_path / "run" / "leaderboard.html").read_bytes()
    shutil.rmtree(zoo)
    for name in (*TABLES, "leaderboard.html"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "run").rename(tmp_path / "moved" / "run")  # pages name the folder, not where it lies
    assert [path.name for path in write_report([load_run(moved)], Terminal())] == [
        "leaderboard.csv",
        "leaderboard.html",
    ]
    assert tables(moved) == expected
    assert (moved / "leaderboard.html").read_bytes() == page


def test_a_failing_attack_fails_its_cell_only(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = ProjectedGradientDescent.search
    calls = []

    def failing(self: ProjectedGradientDescent, victim: object, task: object) -> object:
        calls.append(self.spec.name)
        if self.spec.name == "fgsm" and calls.count("fgsm") == 2:
            raise AttackViolation("attack 'fgsm' left its set: sample 3 is 0.5 outside")
        if self.spec.name == "mim":
            raise RuntimeError("two\nlines")
        return search(self, victim, task)  # type: ignore[arg-type]

    monkeypatch.setattr(ProjectedGradientDescent, "search", failing)
    assert run_matrix(request(tiny_zoo, attacks=("fgsm", "mim", "pgd10")), tmp_path) == 2
    cells = {cell.cell.attack.name: cell for cell in load_run(tmp_path).cells}
    assert cells["fgsm"].cell.error == "attack 'fgsm' left its set: sample 3 is 0.5 outside"
    assert len(cells["fgsm"].rows) == 120
    assert cells["mim"].cell.error == "RuntimeError: two lines"
    assert "Traceback" in cells["mim"].cell.details
    assert (cells["pgd10"].cell.status, len(cells["pgd10"].rows)) == ("ok", N)
    table = pd.read_csv(tmp_path / "leaderboard.csv")
    status = table[table["metric"] == "accuracy"].set_index("attack")["status"].to_dict()
    assert status == {"clean": "ok", "fgsm": "failed", "mim": "failed", "pgd10": "ok"}
    monkeypatch.setattr(ProjectedGradientDescent, "search", search)
    assert run_matrix(request(tiny_zoo, attacks=("fgsm", "mim", "pgd10")), tmp_path) == 0
    assert {cell.cell.status for cell in load_run(tmp_path).cells} == {"ok"}
    assert {cell.cell.error for cell in load_run(tmp_path).cells} == {None}


def test_an_interrupted_run_reports_what_it_has(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProjectedGradientDescent, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_matrix(request(tiny_zoo), tmp_path)
    write_report([load_run(tmp_path)], Terminal())
    table = pd.read_csv(tmp_path / "leaderboard.csv")
    assert set(table["status"]) == {"not run"}


def test_fresh_puts_aside_and_recomputes(tiny_zoo: Path, run_folder: Path) -> None:
    before, expected = shards(run_folder), tables(run_folder)
    run_matrix(request(tiny_zoo, attacks=("pgd10",)), run_folder, fresh=True)
    aside = {path.relative_to(run_folder / "superseded-1") for path in shards(run_folder / "superseded-1")}
    assert len(aside) == 2
    kept = {path: stat for path, stat in shards(run_folder).items() if before.get(path) == stat}
    assert len(kept) == 2
    run_matrix(request(tiny_zoo), run_folder)
    assert tables(run_folder) == expected


def test_epsilon_zero_is_clean(tiny_zoo: Path, tmp_path: Path) -> None:
    assert run_matrix(request(tiny_zoo, attacks=("pgd10",), epsilons=(0.0,)), tmp_path) == 0
    rows = load_run(tmp_path).cells[0].rows
    assert (rows["linf"] == 0).all()
    assert (rows["robust"] == (rows["clean_prediction"] == rows["label"])).all()


def test_nll_of_clean_and_adversarial_images(tiny_zoo: Path, tmp_path: Path) -> None:
    """Against the flow asked directly, with the same noise for a sample before and after."""
    import numpy as np
    from tiny_models import saved_model

    from robbench.cards import Architecture
    from robbench.data import load_dataset
    from robbench.models.flows.glow import Glow

    arguments = {"levels": 2, "steps": 1, "width": 8}
    zoo = tmp_path / "zoo"
    shutil.copytree(tiny_zoo, zoo)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        flow = Glow((1, 8, 8), 17, **arguments)
    saved_model(
        zoo, "tiny-flow", flow, kind="flow", defense="clean", classes=None, grey_levels=17,
        architecture=Architecture(name="glow", arguments=arguments),
    )  # fmt: skip
    wanted = request(
        zoo, attacks=("pgd10", "jsa10"), flow="tiny-flow", n=130, keep_examples=10**9, batch_size=50
    )
    assert run_matrix(wanted, tmp_path / "run") == 0
    run = load_run(tmp_path / "run")
    for cell in run.cells:
        assert cell.cell.nll_flow is not None
        assert cell.cell.nll_flow.name == "tiny-flow"
        assert cell.cell.flow == (None if cell.cell.attack.name == "pgd10" else "tiny-flow")
        ids = cell.rows["sample_id"].tolist()
        x, _ = load_dataset("digits").test.by_ids(ids)
        adversarial = torch.from_numpy(
            np.stack([np.frombuffer(e, "<f4").reshape(1, 8, 8) for e in cell.rows["example"]]).copy()
        )
        with torch.no_grad():
            before, after = (flow.bits_per_dim(images, seed=0, sample_ids=ids) for images in (x, adversarial))
        assert cell.rows["nll_before"].tolist() == pytest.approx(before.tolist(), rel=1e-3)
        assert cell.rows["nll_after"].tolist() == pytest.approx(after.tolist(), rel=1e-3)
        assert (before != after).any()
    without = request(zoo, attacks=("pgd10",), n=130)
    run_matrix(without, tmp_path / "without")
    if load_run(tmp_path / "without").cells[0].cell.nll_flow is None:
        assert load_run(tmp_path / "without").cells[0].rows["nll_before"].isna().all()


def test_dry_run_computes_and_writes_nothing(
    tiny_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run_matrix(request(tiny_zoo, attacks=("fgsm",), n=100), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    dry_run_table(request(tiny_zoo, n=250), tmp_path / "run")
    text = capsys.readouterr().out
    # fgsm: 250 wanted, 100 there, 3 forwards and 1 backward each; pgd10: 12 and 10 for all 250.
    for numbers in (["100", "3", "1", "450", "150"], ["0", "12", "10", "3,000", "2,500"]):
        assert any(line.split()[-6:-1] == numbers for line in text.splitlines()), text
    assert "at most 3,450 forwards and 2,650 backwards" in text
    assert "hours at the rates measured on cpu" in text
    dry_run_table(request(tiny_zoo), tmp_path / "new")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_dry_run_fits_80_columns(
    tiny_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    dry_run_table(request(tiny_zoo, attacks=("aa", "pgd10-l2")), tmp_path / "run")
    text = capsys.readouterr().out
    assert "…" not in text
    assert any(line.split()[:2] == ["tiny-a", "pgd10-l2"] for line in text.splitlines()), text


# ------------------------------------------------------------------------------------------ real processes
def command(tiny_zoo: Path, folder: Path, specs: Path) -> list[object]:
    models = ["--model", "tiny-a,tiny-b", "--attacks", "slow-pgd", "--zoo", tiny_zoo]
    return ["run", *models, "--threat-models", specs, "--out", folder, "--device", "cpu"]


@pytest.fixture
def slow_specs(tmp_path: Path) -> Path:
    folder = tmp_path / "specs"
    folder.mkdir()
    (folder / "slow.yaml").write_text(SLOW)
    return folder


def wait_for_two_shards(process: Command, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while len(shards(folder)) < 2:
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_kill_9_and_run_again(tiny_zoo: Path, tmp_path: Path, slow_specs: Path) -> None:
    """Shards finished before the kill are untouched, and the tables are those of a run left alone."""
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    with started(*command(tiny_zoo, killed, slow_specs)) as process:
        wait_for_two_shards(process, killed)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = shards(killed)
    assert 2 <= len(before) < 6
    for folder in (killed, alone):
        code, printed, errors = finished(*command(tiny_zoo, folder, slow_specs))
        assert code == 0, errors
        assert str(folder / "leaderboard.csv") in printed
        assert str(folder / "leaderboard.html") in printed
    after = shards(killed)
    assert len(after) == 6
    assert {path: after[path] for path in before} == before
    assert tables(killed) == tables(alone)
    columns = {path.relative_to(killed): pq.read_table(path) for path in shards(killed)}
    assert columns == {path.relative_to(alone): pq.read_table(path) for path in shards(alone)}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_how_to_resume(
    how: signal.Signals, tiny_zoo: Path, tmp_path: Path, slow_specs: Path
) -> None:
    with started(*command(tiny_zoo, tmp_path / "run", slow_specs)) as process:
        wait_for_two_shards(process, tmp_path / "run")
        process.send_signal(how)
        assert process.wait(60) == 128 + how
        assert "run the same command again to resume" in process.stderr
        assert "Traceback" not in process.stderr
    assert not list((tmp_path / "run").rglob("*.tmp"))
    statuses = [
        json.loads(path.read_text())["status"] for path in (tmp_path / "run").glob("cells/*/cell.json")
    ]
    assert statuses == ["running", "running"]
