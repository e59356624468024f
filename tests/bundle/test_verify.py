"""Honest bundles verify; forged ones, hashed again by the forger, do not, each for its reason."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor
from written_runs import edited
from zoo_runs import (
    KEPT,
    ZOO,
    Forgery,
    N,
    attacked,
    bundled,
    checked,
    differing,
    reason,
    say_robust,
    stored_row,
)

from robbench.attacks.trust.suspicions import Diagnostics
from robbench.attacks.witness import Witness
from robbench.bundle import rescore, suspicions
from robbench.bundle.archive import open_bundle, pack
from robbench.bundle.findings import judge
from robbench.bundle.images import clean_images, data_findings, image_findings
from robbench.bundle.rerun import _judge_together
from robbench.cli.app import main
from robbench.compare.paired import RULES
from robbench.compare.pairs import Pair
from robbench.core.errors import UserError
from robbench.data import load_dataset
from robbench.models.flows import Latents
from robbench.models.loading import load_flow
from robbench.models.zoo import read_entry
from robbench.store.ledger import Ledger, load_run
from robbench.store.records import CellResult

AT, GLOW = "digits-at", "digits-glow"
EPSILON = 0.2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two attacks on a classifier and one on a flow."""
    folder = tmp_path_factory.mktemp("zoo") / "run"
    return attacked(folder, [AT, GLOW], ["pgd10", "jsa10", "nll-in"])


@pytest.fixture(scope="module")
def honest(run: Path) -> Path:
    return bundled(run, run.parent / "honest.zip")


@pytest.fixture
def forgery(run: Path, tmp_path: Path) -> Forgery:
    return Forgery(run, tmp_path)


def label_of_flow(run: Path) -> str:
    return next(
        p["attack"] for p in yaml.safe_load((run / "run.yaml").read_text())["cells"] if p["model"] == GLOW
    )


# -------------------------------------------------------------------------------------------------------- honest
def test_the_digits_zoo_round_trips(honest: Path) -> None:
    result = checked(honest, models=(AT,), share=1.0)
    assert result.exit_code == 0
    assert {f.verdict for f in result.findings} == {"agrees"}
    counts = {(f.model, f.attack, f.check): f.count for f in result.findings}
    assert counts[AT, "pgd10", "verdicts"] == counts[AT, "jsa10", "witness"] == KEPT
    assert counts[AT, "", "clean"] == counts[AT, "jsa10", "re-run"] == N
    assert counts["", "", "re-run"] == 3 * N
    checks = {f.check for f in result.findings if f.model == GLOW}
    assert checks == {"rows", "address", "ball", "model", "likelihood", "re-run"}


def test_a_part_is_run_again(honest: Path) -> None:
    result = checked(honest, share=0.1, rerun_samples=4, seed=3)
    again = [f for f in result.findings if f.check == "re-run"]
    assert [f.count for f in again] == [4]
    assert result.about["seed"] == 3
    assert "seed 3" in " ".join(result.notes)


def test_a_fresh_seed_every_time(honest: Path) -> None:
    """Nobody can know which cells are run again."""
    seeds = {checked(honest, seed=None, files_only=True).about["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_command(honest: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(honest), "--share", "0", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["exit_code"], document["counts"]["differs"], document["cells"]) == (0, 0, 3)
    shown = CliRunner().invoke(main, ["verify", str(honest), "--files-only"])
    assert shown.exit_code == 0
    assert "nothing was re-scored" in shown.output
    assert AT in shown.output


def searched_in(precision: str, place: Path) -> Path:
    """A bundle of two cells that say they were searched in `precision`, as an earlier version would have written it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robbench.run.cells.format_record", lambda *_: precision)
        return bundled(attacked(place / "run", [AT], ["pgd10", "fgsm"]), place / "old.zip")


@pytest.mark.parametrize("precision", ["bf16", "bf16, compiled"])
def test_searches_since_withdrawn_are_rescored_and_never_run_again(precision: str, tmp_path: Path) -> None:
    """Each such cell is named whatever the share, so that no bundle escapes a re-run by claiming such a search."""
    result = checked(searched_in(precision, tmp_path), share=0.01)
    assert result.exit_code == 3
    whole, *cells = result.of("unchecked")
    assert [(f.attack, f.check, f.count) for f in cells] == [("pgd10", "re-run", 0), ("fgsm", "re-run", 0)]
    assert all(f.reason.startswith("cannot be run again: searched in bf16, which was") for f in cells)
    assert whole.reason.startswith("nothing re-run")
    counts = {(f.attack, f.check): (f.verdict, f.count) for f in result.findings if f.model == AT}
    assert counts["pgd10", "verdicts"] == ("agrees", KEPT)


def test_an_unknown_search_does_not_end_the_verification(tmp_path: Path) -> None:
    result = checked(searched_in("fp8", tmp_path), share=1.0)
    assert result.exit_code == 3
    assert [f.reason.partition(";")[0] for f in result.of("unchecked")] == [
        "not re-run: unknown precision 'fp8'"
    ] * 2


# --------------------------------------------------------------------------------------------- what models are held to
def test_a_model_that_is_not_here(run: Path, tmp_path: Path) -> None:
    """Its examples are not re-scored, and that is no success; with its card it is."""
    folder = foreign_model(tmp_path, "digits-trades", "my-own")
    bundle = bundled(attacked(tmp_path / "run", [str(folder)], ["pgd10"]), tmp_path / "own.zip")
    result = checked(bundle, share=1.0)
    assert result.exit_code == 3
    assert "not re-scored" in reason(result, "model")
    assert "no cell that can be run again has its model" in reason(result, "re-run")
    assert checked(bundle, files_only=True).exit_code == 0
    assert checked(bundle, models=(str(folder),)).exit_code == 0
    with pytest.raises(UserError, match=r"--model 'digits-at' .* is none of the bundle's models: my-own"):
        checked(bundle, models=(AT,))


def foreign_model(place: Path, source: str, name: str) -> Path:
    """A folder with the weights of one model under another name."""
    folder = place / name
    shutil.copytree(ZOO / source, folder)
    card = yaml.safe_load((folder / "card.yaml").read_text())
    (folder / "card.yaml").write_text(yaml.safe_dump({**card, "name": name}))
    return folder


def test_a_card_with_other_weights(honest: Path, tmp_path: Path) -> None:
    folder = foreign_model(tmp_path, "digits-trades", AT)
    result = checked(honest, models=(str(folder),))
    assert (result.exit_code, differing(result)) == (1, {"model"})
    assert "measured on weights" in reason(result, "model")


def test_a_bundle_of_other_weights_under_a_zoo_name(tmp_path: Path) -> None:
    """Measured on other weights that are called digits-at: the zoo's digits-at is another model."""
    folder = foreign_model(tmp_path, "digits-trades", AT)
    bundle = bundled(attacked(tmp_path / "run", [str(folder)], ["pgd10"]), tmp_path / "other.zip")
    assert differing(checked(bundle)) == {"model"}
    assert differing(checked(bundle, files_only=True)) == set()  # no model is asked


def test_a_foreign_weights_file(honest: Path, tmp_path: Path) -> None:
    """Other bytes behind the right card are refused by their hash."""
    folder = tmp_path / AT
    shutil.copytree(ZOO / AT, folder)
    weights = folder / "weights.safetensors"
    weights.write_bytes((ZOO / "digits-trades" / "weights.safetensors").read_bytes())
    with pytest.raises(UserError, match="sha256"):
        checked(honest, models=(str(folder),))


# ------------------------------------------------------------------------------------- forged rows, hashed again
def test_a_changed_verdict(forgery: Forgery) -> None:
    """Consistent in itself and hashed again: only the model can tell."""
    forgery.edit(AT, "pgd10", lambda rows: say_robust(rows, stored_row(rows, robust=False)))
    bundle = forgery.bundle()
    assert checked(bundle, files_only=True).exit_code == 0
    result = checked(bundle)
    assert result.exit_code == 1
    assert differing(result) == {"verdicts", "margins"}
    assert f"1 of {KEPT} verdicts are others" in reason(result, "verdicts")


def test_a_verdict_without_an_example(forgery: Forgery) -> None:
    """Nothing stored contradicts it: only attacking again does, beyond what rounding may flip."""

    def forge(rows: pd.DataFrame) -> None:
        rows["example"] = None
        for at in rows.index[~rows["robust"] & (rows["clean_margin"] > 0)]:
            say_robust(rows, at)

    bundle = forgery.edit(AT, "pgd10", forge).bundle()
    silent = checked(bundle)
    assert (silent.exit_code, differing(silent)) == (3, set())
    assert "1 of 2 cells store no example (pgd10)" in reason(silent, "verdicts")
    result = checked(bundle, share=1.0, flip_tolerance=0.0)
    assert differing(result) == {"re-run"}
    assert "verdicts flipped" in reason(result, "re-run")


def leave_the_ball(rows: pd.DataFrame) -> None:
    at = stored_row(rows)
    image = np.frombuffer(rows.loc[at, "example"], "<f4").copy()
    pixel = int(np.abs(image - 0.5).argmin())  # far from the edges of the box
    image[pixel] += 0.45 if image[pixel] < 0.5 else -0.45
    rows.at[at, "example"] = image.tobytes()


def test_an_example_out_of_its_ball(forgery: Forgery) -> None:
    result = checked(forgery.edit(AT, "pgd10", leave_the_ball).bundle(), files_only=True)
    assert (result.exit_code, differing(result)) == (1, {"ball"})
    assert "outside the linf ball" in reason(result, "ball")


def test_a_likelihood_example_out_of_its_ball(run: Path, forgery: Forgery) -> None:
    result = checked(forgery.edit(GLOW, label_of_flow(run), leave_the_ball).bundle(), files_only=True)
    assert differing(result) == {"ball"}


def scaled(column: str, factor: float) -> Callable[[pd.DataFrame], None]:
    def change(rows: pd.DataFrame) -> None:
        rows.loc[stored_row(rows), column] *= factor

    return change


@pytest.mark.parametrize(
    ("column", "factor", "check"),
    [("margin", 1.01, "margins"), ("l2", 0.99, "ball"), ("nll_after", 0.99, "likelihood")],
)
def test_a_changed_number(forgery: Forgery, column: str, factor: float, check: str) -> None:
    """Small enough to contradict nothing else."""
    result = checked(forgery.edit(AT, "pgd10", scaled(column, factor)).bundle())
    assert (result.exit_code, differing(result)) == (1, {check})


def test_a_changed_likelihood_of_a_flow(run: Path, forgery: Forgery) -> None:
    result = checked(forgery.edit(GLOW, label_of_flow(run), scaled("nll_before", 0.99)).bundle())
    assert differing(result) == {"likelihood"}


def test_a_changed_clean_verdict_without_an_example(forgery: Forgery) -> None:
    """Clean images need no example: every row's clean margin is held to the model."""

    def forge(rows: pd.DataFrame) -> None:
        rows.loc[rows["example"].isna().idxmax(), "clean_margin"] *= 1.01

    for attack in ("pgd10", "jsa10"):
        forgery.edit(AT, attack, forge)
    assert differing(checked(forgery.bundle())) == {"clean"}


def test_a_changed_label(forgery: Forgery) -> None:
    def forge(rows: pd.DataFrame) -> None:
        at = rows.index[(rows["clean_margin"] > 0) & ~rows["robust"]][0]
        rows.loc[at, ["label", "clean_prediction"]] = (rows.loc[at, "prediction"] + 1) % 10

    for attack in ("pgd10", "jsa10"):
        forgery.edit(AT, attack, forge)
    result = checked(forgery.bundle(), files_only=True)
    assert "samples" in differing(result)
    assert "labels are not the data set's" in reason(result, "samples")


def test_a_label_that_is_no_class(forgery: Forgery) -> None:
    """No model can be asked about it, and none is."""
    result = checked(forgery.edit(AT, "pgd10", lambda rows: rows.assign(label=10)).bundle(), share=1.0)
    assert result.exit_code == 1
    assert "label is no class" in reason(result, "rows")
    assert not [f for f in result.findings if f.attack == "pgd10" and f.check in ("verdicts", "re-run")]


def test_other_samples(forgery: Forgery) -> None:
    """An easier sample in place of one that the seed drew."""
    plan = forgery.ledger.read_run()
    assert plan is not None
    drawn = plan.sample_ids
    ids = load_dataset("digits").test.ids.tolist()
    stranger, out = next(i for i in ids if i not in drawn), drawn[-1]
    samples = " ".join(map(str, [*drawn[:-1], stranger]))
    forgery.ledger.write_run(plan.model_copy(update={"samples": samples}), {})
    for entry in plan.cells:
        forgery.edit(
            entry.model,
            entry.attack,
            lambda r: r.assign(sample_id=r["sample_id"].replace(out, stranger)),
        )
    result = checked(forgery.bundle(), files_only=True)
    assert "samples" in differing(result)
    assert f"1 of {N} sample ids are not those that seed 0 draws" in reason(result, "samples")


def test_a_weaker_attack_under_its_name(forgery: Forgery) -> None:
    """ "pgd10" with one step, or with a tenth of its step size: the name promises what robbench calls so."""
    spec = forgery.record(AT, "pgd10").attack
    weak = spec.model_copy(update={"parameters": {**spec.parameters, "relative_step_size": 0.01}})
    result = checked(forgery.change_record(AT, "pgd10", attack=weak).bundle(), files_only=True)
    assert differing(result) == {"settings", "address"}
    assert "parameters.relative_step_size is 0.01, here it is" in reason(result, "settings")


def test_a_weaker_attack_on_one_model_only(tmp_path: Path) -> None:
    """Which of two cells comes first does not matter."""
    run = attacked(tmp_path / "run", [AT, "digits-trades"], ["fgsm"])
    for number, model in enumerate((AT, "digits-trades")):
        place = tmp_path / str(number)
        place.mkdir()
        forged = Forgery(run, place)
        spec = forged.record(model, "fgsm").attack
        weak = spec.model_copy(update={"parameters": {**spec.parameters, "relative_step_size": 0.01}})
        result = checked(forged.change_record(model, "fgsm", attack=weak).bundle(), files_only=True)
        assert differing(result) == {"settings", "address"}
        assert "is not the same in the bundle" in reason(result, "settings")


def test_a_larger_budget_of_the_ball(forgery: Forgery) -> None:
    """A claimed epsilon that is not that of the label."""
    spec = forgery.record(AT, "pgd10").attack
    wide = spec.model_copy(update={"epsilon": 0.3})
    result = checked(forgery.change_record(AT, "pgd10", attack=wide).bundle(), files_only=True)
    assert "epsilon is 0.3, here it is 0.2" in reason(result, "settings")


# ------------------------------------------------------------------------- suspicions and bundled threat models
def with_counts(forgery: Forgery, **changes: object) -> Forgery:
    """The shards of digits-at x pgd10 with other counts in their metadata."""
    cell = forgery.record(AT, "pgd10").hash
    for block, shard in enumerate(forgery.ledger.shards(cell, lambda path, why: None)):
        counts = json.loads(shard.diagnostics) | changes
        shard.path.unlink()
        table = shard.table.replace_schema_metadata()
        forgery.ledger.write_shard(cell, block, table, shard.seconds, json.dumps(counts))
    return forgery


def test_a_suspicion_that_is_left_out(forgery: Forgery) -> None:
    """The counts in the shards say that gradients vanish; the record, which tables print, says nothing."""
    result = checked(with_counts(forgery, probed=10, zero_gradients=9).bundle(), files_only=True)
    assert (result.exit_code, differing(result)) == (1, {"suspicions"})
    assert "it leaves out: the input gradient of the cross-entropy is zero" in reason(result, "suspicions")
    stated = Diagnostics.model_validate(
        json.loads(
            forgery.ledger.shards(forgery.record(AT, "pgd10").hash, lambda path, why: None)[0].diagnostics
        )
    ).suspicions
    forgery.change_record(AT, "pgd10", suspicions=tuple(one.text for one in stated))
    forgery.out.unlink()
    assert differing(checked(forgery.bundle(), files_only=True)) == set()


def test_a_suspicion_with_advice_of_another_wording(forgery: Forgery) -> None:
    """Bundles outlive the wording of next steps; what was found must be the same to the letter."""
    (one,) = Diagnostics(samples=N, probed=10, zero_gradients=9).suspicions
    with_counts(forgery, probed=10, zero_gradients=9)
    said, _, _ = one.text.rpartition("; ")
    forgery.change_record(AT, "pgd10", suspicions=(f"{said}; do something else",))
    assert differing(checked(forgery.bundle(), files_only=True)) == set()
    forgery.change_record(AT, "pgd10", suspicions=(one.text.replace("9 of 10", "1 of 10"),))
    forgery.out.unlink()
    assert differing(checked(forgery.bundle(), files_only=True)) == {"suspicions"}


def test_a_suspicion_without_counts(forgery: Forgery) -> None:
    result = checked(forgery.change_record(AT, "pgd10", suspicions=("made up",)).bundle(), files_only=True)
    assert differing(result) == {"suspicions"}
    assert "its counts do not give: made up" in reason(result, "suspicions")


def test_counts_that_were_taken_out(forgery: Forgery) -> None:
    result = checked(with_counts(forgery, samples=0).bundle())
    assert (result.exit_code, differing(result)) == (3, set())
    assert f"its shards count 0 of {N} samples" in reason(result, "suspicions")


@pytest.mark.parametrize("content", ["{", "[]", '{"samples": "x"}', '{"zero_gradients": 1}', "[" * 100_000])
def test_counts_that_are_none(run: Path, content: str) -> None:
    folder, result = run, load_run(run).cells[0]
    shards = Ledger(folder).shards(result.cell.hash, lambda path, why: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "shards", lambda *_: [replace(shard, diagnostics=content) for shard in shards])
        found = suspicions._finding(folder, result)
    assert found.verdict == "differs"
    assert "no counts that robbench writes" in found.reason


def test_a_bundled_threat_model_with_another_budget(honest: Path, tmp_path: Path) -> None:
    """Who reads the bundle's YAML would take another ball for the one that was measured."""

    def shrink(files: dict[str, bytes]) -> None:
        for name in [name for name in files if name.startswith("threat_models/")]:
            document = yaml.safe_load(files[name])
            if "pgd10" in document["attacks"]:
                document["budgets"]["digits"]["epsilon"] = 0.05
                files[name] = yaml.safe_dump(document, sort_keys=False).encode()

    result = checked(edited(honest, tmp_path / "forged.zip", shrink, rehash=True), files_only=True)
    assert (result.exit_code, differing(result)) == (1, {"settings"})
    assert "not as in the bundle's own threat_models: " in reason(result, "settings")


# ------------------------------------------------------------------------------------------------------ witnesses
def with_witness(change: Callable[[Witness], Witness]) -> Callable[[pd.DataFrame], None]:
    def edit(rows: pd.DataFrame) -> None:
        at = rows["witness"].notna().idxmax()
        rows.at[at, "witness"] = change(Witness.from_bytes(rows.loc[at, "witness"])).to_bytes()

    return edit


def perturbed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Witness], Witness]:
    return lambda w: Witness(w.flow, w.condition, {**w.perturbations, name: change(w.perturbations[name])})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (perturbed("lambda", lambda v: 3 * v), "budget of lambda"),
        (perturbed("delta", lambda v: 3 * v), "budget of delta"),
        (perturbed("lambda", lambda v: 0.5 * v), "rendered from its witness"),
        (perturbed("lambda", lambda v: np.nan * v), "not finite"),
        (perturbed("delta", lambda v: v.ravel()), "shape"),
        (lambda w: Witness(w.flow, w.condition, {"lambda": w.perturbations["lambda"]}), "holds lambda, not"),
        (lambda w: Witness("0" * 64, w.condition, w.perturbations), "another flow"),
        (lambda w: Witness(w.flow, (w.condition + 1) % 10, w.perturbations), "another condition"),
    ],
)
def test_a_false_witness(run: Path, change: Callable[[Witness], Witness], why: str) -> None:
    loaded = load_run(run)
    result = next(r for r in loaded.cells if r.cell.attack.label == "jsa10")
    rows = result.rows.copy()
    with_witness(change)(rows)
    forged = replace(loaded, cells=[CellResult(result.cell, rows)])
    source = clean_images(forged, load_dataset("digits"))
    flow = load_flow(read_entry(ZOO / GLOW))
    found = {f.check: f for f in image_findings(forged, source, lambda _cell: flow)}
    assert (found["ball"].verdict, found["witness"].verdict) == ("agrees", "differs")
    assert why in found["witness"].reason


def test_witnesses_of_a_flow_that_does_not_invert_itself(run: Path) -> None:
    """Every image is looked at: the decoder is off on one of the clean images alone."""
    loaded = load_run(run)
    result = next(r for r in loaded.cells if r.cell.attack.label == "jsa10")
    one = replace(loaded, cells=[result])
    source, flow = clean_images(one, load_dataset("digits")), load_flow(read_entry(ZOO / GLOW))
    stored = result.rows[result.rows["witness"].notna()]
    odd, _ = load_dataset("digits").test.by_ids([int(stored["sample_id"].iloc[-1])])
    decode = flow.decode

    def inexact(latents: Latents, y: Tensor | None = None, u: float | Tensor = 0.5) -> Tensor:
        image = decode(latents, y, u)
        near = (image - odd).flatten(1).norm(dim=1) < 1e-2
        return torch.where(near[:, None, None, None], 0.9 * image, image)

    flow.decode = inexact  # type: ignore[method-assign]
    found = {f.check: f for f in image_findings(one, source, lambda _cell: flow)}
    assert found["witness"].verdict == "differs"
    assert "does not invert itself" in found["witness"].reason
    assert "on 1 of" in found["witness"].reason


def test_missing_witnesses(forgery: Forgery) -> None:
    def one(rows: pd.DataFrame) -> None:
        rows.at[rows["witness"].notna().idxmax(), "witness"] = None

    forgery.edit(AT, "jsa10", one)
    assert "lack the witness" in reason(checked(forgery.bundle()), "witness")
    forgery.out.unlink()
    result = checked(forgery.edit(AT, "jsa10", lambda rows: rows.assign(witness=None)).bundle())
    assert result.exit_code == 3
    assert "no witnesses are stored" in reason(result, "witness")


# ------------------------------------------------------------------------------------------------- the file itself
def test_an_edited_table(honest: Path, tmp_path: Path) -> None:
    with open_bundle(honest) as bundle:
        tables = dict.fromkeys(bundle.manifest.tables, "0" * 64)
        pack(bundle.folder, bundle.manifest.model_copy(update={"tables": tables}), tmp_path / "x.zip")
    result = checked(tmp_path / "x.zip", files_only=True)
    assert (result.exit_code, differing(result)) == (1, {"tables"})


def without_a_shard(source: Path, target: Path) -> None:
    with ZipFile(source) as old, ZipFile(target, "w") as new:
        left_out = next(name for name in old.namelist() if name.endswith(".parquet"))
        for name in old.namelist():
            if name != left_out:
                new.writestr(name, old.read(name))


def with_a_climber(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with ZipFile(target, "a") as archive:
        archive.writestr("../../climbed.yaml", "x")


def with_a_bomb(source: Path, target: Path) -> None:
    import zipfile

    shutil.copyfile(source, target)
    with ZipFile(target, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cards/bomb.yaml", b"0" * (32 << 20))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [(without_a_shard, "is missing"), (with_a_climber, "climbs out"), (with_a_bomb, "zip bomb")],
)
def test_files_that_are_refused(
    honest: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], why: str
) -> None:
    spoil(honest, tmp_path / "bad.zip")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "bad.zip")])
    assert result.exit_code == 2
    assert why in result.stderr
    assert not (tmp_path.parent / "climbed.yaml").exists()


# -------------------------------------------------------------------------------------------- without the data set
def test_without_the_data_set(honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the bundle's own originals, which is said; and nothing can be run again."""

    def absent(*_arguments: object) -> None:
        raise UserError("data set 'digits' is absent")

    monkeypatch.setattr("robbench.bundle.verify.load_dataset", absent)
    result = checked(honest)
    assert (result.exit_code, differing(result)) == (0, set())
    weaker = {f.check for f in result.of("weaker")}
    assert weaker == {"samples", "originals", "ball", "clean"}
    assert checked(honest, share=0.5).exit_code == 3


def test_forged_originals(forgery: Forgery) -> None:
    """A clean image moved towards the adversarial one shrinks distances: the data set says otherwise."""
    path = forgery.folder / "originals.npz"
    with np.load(path) as stored:
        ids, images = stored["ids"], stored["images"].copy()
    images[0] = 1 - images[0]
    np.savez_compressed(path, ids=ids, images=images)
    result = checked(forgery.bundle(), files_only=True)
    assert differing(result) == {"originals"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"share": 1.5}, "--share 1.5 is no share"),
        ({"flip_tolerance": -0.1}, "--flip-tolerance -0.1 is no share"),
        ({"files_only": True, "models": (AT,)}, "--files-only asks no model"),
    ],
)
def test_options_that_do_not_fit(honest: Path, options: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        checked(honest, **options)


def test_claims_that_nobody_checked(forgery: Forgery) -> None:
    """A note would stand under every table, and a card on the page of its model: both are told."""
    plan, card = forgery.ledger.read_run(), forgery.folder / "cards" / f"{AT}.yaml"
    assert plan is not None
    forgery.ledger.write_run(plan.model_copy(update={"note": "all of it re-run"}), {})
    card.write_text(yaml.safe_dump({**yaml.safe_load(card.read_text()), "description": "certified"}))
    notes = checked(forgery.bundle()).notes
    assert "the bundle says of itself: 'all of it re-run'" in notes
    assert f"the card of {AT} in the bundle is not the one here in description" in notes


def test_budgets_of_another_data_set(run: Path) -> None:
    """A bundle may not say that its data set is like one with smaller budgets."""
    own, dataset = load_run(run), load_dataset("digits")
    assert own.data is not None
    forged = replace(own, data=own.data.model_copy(update={"like": "cifar10"}))
    for one, verdict in ((own, "agrees"), (forged, "differs")):
        found = list(data_findings(one, clean_images(one, dataset), dataset))
        assert [f.verdict for f in found if f.check == "samples"] == [verdict]


# ------------------------------------------------------------------------------------------- what rounding excuses
@pytest.mark.parametrize(("false", "verdict"), [(0, "agrees"), (1, "agrees"), (24, "unchecked")])
def test_logits_too_small_to_tell(false: int, verdict: str) -> None:
    """A model whose logits are all within 1e-4 has every verdict excused, which is no agreement."""
    logits = torch.randn(24, 10, generator=torch.Generator().manual_seed(0)) * 1e-6
    right = logits.argmax(1)
    said = torch.where(torch.arange(24) < false, (right + 1) % 10, right)
    rows = pd.DataFrame({"prediction": said.numpy(), "margin": np.where(said == right, 1e-6, -5e-5)})
    scored = rescore.Scored(right, (logits, logits))
    wrong, excused = rescore.other_verdicts(scored, rows, "prediction", "margin")
    assert not wrong.any()
    assert excused == false
    assert rescore._judge_excused(judge(AT, "pgd10", "verdicts", 24, []), excused).verdict == verdict


@pytest.mark.parametrize(
    ("noise", "false", "verdict"), [(0.0, 0, "weaker"), (0.0, 90, "unchecked"), (3.0, 0, "weaker")]
)
def test_a_randomised_model_is_no_excuse(noise: float, false: int, verdict: str) -> None:
    """Stored verdicts may differ about as often as two scorings here do."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(100, 10, generator=draw)
    logits = logits + 3 * torch.nn.functional.one_hot(logits.argmax(1), 10)
    first, last, past = (logits + noise * torch.randn(100, 10, generator=draw) for _ in range(3))
    said = torch.where(torch.arange(100) < false, (past.argmax(1) + 1) % 10, past.argmax(1))
    rows = pd.DataFrame({"prediction": said.numpy()})
    scored = rescore.Scored(logits.argmax(1), (first, last))
    assert rescore._randomised_finding(AT, "pgd10", "verdicts", scored, rows, "prediction").verdict == verdict


@pytest.mark.parametrize(
    ("n", "margin", "flipped", "verdict", "why"),
    [
        (1, 2.0, 1, "unchecked", "too few to judge flips by"),
        (40, 2.0, 1, "agrees", "1 of 40 verdicts flipped"),
        (40, 2.0, 20, "differs", "20 of 40 verdicts flipped"),
        (40, 1e-4, 20, "unchecked", "logits this small decide nothing"),
        (40, 1e-4, 1, "agrees", "0 of 40 verdicts flipped"),
    ],
)
def test_flips_of_a_re_run(n: int, margin: float, flipped: int, verdict: str, why: str) -> None:
    def rows(robust: np.ndarray) -> pd.DataFrame:
        after = np.where(robust, margin, -margin)
        numbers = dict.fromkeys(("step", "size", "forwards", "backwards", "before", "label"), 0.0)
        by = np.where(robust, None, "pgd10")
        return pd.DataFrame(
            {"sample_id": range(n), "robust": robust, "after": after, "broken_by": by} | numbers
        )

    said, found = np.ones(n, dtype=np.bool_), np.arange(n) >= flipped
    pair = Pair(rows(said), rows(found), np.full(n, "pgd10", dtype=np.object_))
    finding = _judge_together([pair], RULES["default"])
    assert (finding.verdict, why in finding.reason) == (verdict, True)
