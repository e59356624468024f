"""run.yaml, cell.json and the Fréchet records are what robbench wrote, or nothing of them is printed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.core.resources import data_root
from robbench.core.schema import Strict, yaml_text
from robbench.store.ledger import load_run
from robbench.store.record_files import CHECKSUM, EditedRecordError, with_checksum, without_checksum

RUN = ("run", "--model", "digits-at", "--attacks", "fgsm,mim", "--n", "12", "--keep-examples", "0")


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = invoked(*RUN, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder


def restored(path: Path, text: str, check: Callable[[], None]) -> None:
    """Run `check` with another text in `path`."""
    whole = path.read_text(encoding="utf-8")
    assert text != whole
    path.write_text(text, encoding="utf-8")
    try:
        check()
    finally:
        path.write_text(whole, encoding="utf-8")


def leaves(value: object, at: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Places of everything in a document that is neither a list nor a dictionary with something in it."""
    if isinstance(value, dict) and value:
        return [place for key, part in value.items() for place in leaves(part, (*at, key))]
    if isinstance(value, list) and value:
        return [place for k, part in enumerate(value) for place in leaves(part, (*at, k))]
    return [at]


def other(value: object) -> object:
    """Another value of the same type where there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str) and len(value) == 64:
        return ("0" if value[0] != "0" else "1") + value[1:]
    return f"{value}x" if isinstance(value, str) else "x"


def with_other(content: object, place: tuple[object, ...]) -> object:
    copy = json.loads(json.dumps(content))
    part = copy
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = other(part[place[-1]])
    return copy


def refused(folder: Path) -> None:
    with pytest.raises(UserError):
        load_run(folder)


def refused_everywhere(folder: Path) -> None:
    for arguments in (
        ("report", folder),
        ("export", folder, "-o", folder.parent / "x.zip"),
        ("badge", folder),
    ):
        result = invoked(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert result.stderr.count("\n") == 1
    with pytest.raises(UserError):
        load_run(folder)


def test_a_budget_edited_in_a_cell_is_not_printed(run: Path) -> None:
    path = next(run.glob("cells/*/cell.json"))
    text = path.read_text().replace('"epsilon": 0.2', '"epsilon": 0.4')

    def check() -> None:
        refused_everywhere(run)
        with pytest.raises(
            EditedRecordError, match=r"cell\.json: was changed after robbench wrote it .*run the same"
        ):
            load_run(run)

    restored(path, text, check)
    load_run(run)


def test_every_field_of_cell_and_run_is_bound(run: Path) -> None:
    cell = next(run.glob("cells/*/cell.json"))
    record = json.loads(cell.read_text())
    for place in leaves(record):
        restored(cell, json.dumps(with_other(record, place)), lambda: refused(run))
    plan = yaml.safe_load((run / "run.yaml").read_text())
    for place in leaves(plan):
        text = yaml.safe_dump(with_other(plan, place), sort_keys=False)
        restored(run / "run.yaml", text, lambda: refused(run))
    for name in plan:
        rest = {key: value for key, value in plan.items() if key != name}
        if name != "schema_version":  # a plan that says it is of before there were checksums may not have one
            restored(run / "run.yaml", yaml.safe_dump(rest), lambda: refused(run))


def test_a_plan_with_cells_exchanged_is_not_printed(run: Path) -> None:
    """One attack's row under the name of another."""
    plan = yaml.safe_load((run / "run.yaml").read_text())
    first, second = plan["cells"]
    first["attack"], second["attack"] = second["attack"], first["attack"]
    restored(run / "run.yaml", yaml.safe_dump(plan, sort_keys=False), lambda: refused_everywhere(run))


def test_the_same_command_writes_edited_records_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert invoked(*RUN, "--out", folder).exit_code == 0
    cell, plan = next(folder.glob("cells/*/cell.json")), folder / "run.yaml"
    before = plan.read_text()
    shards = {path: path.read_bytes() for path in folder.glob("cells/*/shard-*")}
    cell.write_text(cell.read_text().replace('"epsilon": 0.2', '"epsilon": 0.4'))
    plan.write_text(before.replace("digits-at", "digits-xx"))
    assert invoked("report", folder).exit_code == 2
    assert invoked(*RUN, "--out", folder).exit_code == 0
    assert plan.read_text() == before
    assert {cell.cell.attack.epsilon for cell in load_run(folder).cells} == {0.2}
    assert {path: path.read_bytes() for path in folder.glob("cells/*/shard-*")} == shards, (
        "nothing was computed"
    )


def test_records_of_before_there_were_checksums_are_read(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "old")
    expected = [result.cell.model_dump(exclude={"schema_version"}) for result in load_run(folder).cells]
    for path in folder.glob("cells/*/cell.json"):
        record = json.loads(path.read_text())
        assert record.pop(CHECKSUM)
        path.write_text(json.dumps(record | {"schema_version": 1}))
    plan = yaml.safe_load((folder / "run.yaml").read_text())
    assert plan.pop(CHECKSUM)
    (folder / "run.yaml").write_text(yaml.safe_dump(plan | {"schema_version": 1}))
    assert [r.cell.model_dump(exclude={"schema_version"}) for r in load_run(folder).cells] == expected
    assert invoked("report", folder).exit_code == 0


@pytest.mark.parametrize("name", ["digits-realnvp-steps.zip", "trades-mnist.zip", "mnist-flow.zip"])
def test_bundles_of_before_there_were_checksums_are_read(name: str, tmp_path: Path) -> None:
    bundle = data_root() / "reports" / "runs" / name
    if not bundle.is_file():
        pytest.skip(f"reports/runs/{name} is not in an installed package")
    result = invoked("report", bundle, "--out", tmp_path / "site")
    assert result.exit_code == 0, result.output


class Anything(Strict):
    schema_version: int = 2
    text: str
    numbers: tuple[float, ...]
    words: dict[str, str]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    text=TEXT,
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    words=st.dictionaries(TEXT.filter(lambda key: key not in ("", CHECKSUM)), TEXT, max_size=3),
)
@example(text="\x85", numbers=[], words={"\u2028": "a\u2029b"})
@settings(max_examples=60)
def test_what_is_written_is_read_back_from_both_formats(
    text: str, numbers: list[float], words: dict[str, str]
) -> None:
    content = with_checksum(Anything(text=text, numbers=tuple(numbers), words=words))
    for read in (json.loads(json.dumps(content, ensure_ascii=False)), yaml.safe_load(yaml_text(content))):
        rest = without_checksum(Path("x"), read, "")
        assert rest == {key: value for key, value in content.items() if key != CHECKSUM}
        with pytest.raises(EditedRecordError):
            without_checksum(Path("x"), read | {"text": text + "x"}, "")


def test_a_distance_edited_by_hand_is_not_printed(tmp_path: Path) -> None:
    from robbench.store.frechet_records import FrechetRecord, read_record, record_path, write_record

    fields = {"status": "ok", "cell": None, "model": None, "attack": "clean", "extractor": "FID", "n": 5}
    fields |= dict.fromkeys(
        ("extractor_sha256", "extractor_hash", "dataset_revision", "samples_sha256"), "a" * 64
    )
    fields |= {
        "dataset": "digits",
        "reference_split": "train",
        "reference_n": 9,
        "key": "b" * 64,
        "value": 12.5,
    }
    record = FrechetRecord.model_validate(fields | {"versions": {"robbench": "0.1.0"}})
    write_record(tmp_path, record)
    path = record_path(tmp_path, None, "a" * 64)
    assert read_record(path) == record
    path.write_text(path.read_text().replace("12.5", "2.5"))
    with pytest.raises(
        UserError, match=r"was changed after robbench wrote it .*remove it and run robbench fid again"
    ):
        read_record(path)
