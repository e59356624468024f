"""How commands end: unexpected errors, closed pipes, full disks, places that cannot be written, odd numbers."""

import errno
import os
import tempfile
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import click
import pytest
from click.testing import CliRunner, Result
from processes import finished

import robbench
from robbench.cli.app import main
from robbench.cli.base import FiniteNumber, WholeNumber

DIGITS = "9" * 5000


def invoked(*arguments: object, **options: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]


def assert_refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 600
    for part in parts:
        assert part in result.stderr


# --------------------------------------------------------------------------------------------------- the last resort
@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RecursionError(),
        AssertionError("no"),
        SystemExit(0),
        SystemExit("text"),
        GeneratorExit(),
        OSError(),
    ],
)
def test_the_unexpected_is_one_line_with_its_own_exit_code(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("robbench.cli.catalog.list_kind", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = invoked("list", "attacks")
    assert result.exit_code == 70
    assert result.stderr.count("\n") == 1
    (path,) = tmp_path.iterdir()
    assert str(path) in result.stderr
    assert type(error).__name__ in result.stderr
    assert "report" in result.stderr
    assert "in broken" in path.read_text()
    old = os.umask(0o022)
    os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o666 & ~old
    shown = invoked("--debug", "list", "attacks")
    assert "Traceback" in shown.stderr
    assert "Traceback" in invoked("list", "attacks", env={"ROBBENCH_DEBUG": "1"}).stderr


def test_without_room_for_the_traceback_the_line_still_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("robbench.cli.catalog.list_kind", broken)
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    result = invoked("list", "attacks")
    assert result.exit_code == 70
    assert "could not be written" in result.stderr


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("Unable to allocate 7 PiB")

    monkeypatch.setattr("robbench.cli.catalog.list_kind", broken)
    assert_refused(invoked("list", "attacks"), "not enough memory", "7 PiB")


def test_a_closed_pipe_is_quiet_and_a_full_one_a_line() -> None:
    code, _, errors = finished("list", "published", streams={"stdout": "closed pipe"})
    assert (code, errors) == (141, "")
    code, _, errors = finished("list", "published", streams={"stdout": Path("/dev/full")})
    assert code == 2
    assert errors.count("\n") == 1
    assert "No space left" in errors


def test_names_that_are_no_text(tmp_path: Path) -> None:
    code, _, errors = finished("watch", "\udcff", "--once")
    assert code == 2
    assert "not UTF-8" in errors
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    code, printed, errors = finished(
        "theory", "linear", "--n", "2", "--samples", "50", "--out", "t", cwd=folder
    )
    assert code == 0, errors
    assert r"\udcff" in printed


# ----------------------------------------------------------------------------------------------------------- numbers
def _numeric() -> list[tuple[str, str]]:
    """(command, option) of every option that takes a number, in every command."""
    found = []
    stack: list[tuple[str, click.Command]] = [("", main)]
    while stack:
        path, command = stack.pop()
        if isinstance(command, click.Group):
            stack += [(f"{path} {name}".strip(), sub) for name, sub in command.commands.items()]
        found += [
            (path, option.opts[0])
            for option in command.params
            if isinstance(option, click.Option)
            and not option.is_flag
            and (
                isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
                or option.opts[0]
                in (
                    "--epsilon",
                    "--eta",
                    "--steps",
                    "--temperature",
                    "--seeds",
                    "--keep-examples",
                    "--examples",
                )
            )
        ]
    return sorted(set(found))


@pytest.mark.parametrize(("command", "option"), _numeric())
def test_no_number_makes_a_traceback(command: str, option: str, tmp_path: Path) -> None:
    """Whatever else is missing in these commands: one line and exit code 2, and at once."""
    needed = {
        "run": ["--attacks", "fgsm", "--model", "digits-at"],
        "train": ["--defense", "nope"],
        "export": [tmp_path / "nope", "-o", tmp_path / "a.zip"],
        "samples": ["--model", "nope", "--under", "nope"],
        "bench aa": ["--model", "nope"],
    }.get(
        command,
        [tmp_path / "nope"]
        if command.split()[0] in ("verify", "merge", "check", "diff", "fid", "watch")
        else [],
    )
    if command == "merge":
        needed += ["-o", tmp_path / "m"]
    if command == "diff":
        needed += [tmp_path / "nope2"]
    for text in (DIGITS, "nan", "inf", "1e999", "1e999999999", "x", "-1e400"):
        result = invoked(*command.split(), *needed, f"{option}={text}")
        assert_refused(result)


def test_types_of_numbers() -> None:
    assert WholeNumber(1).convert("18", None, None) == 18
    assert FiniteNumber().convert("1/4", None, None) == 0.25
    for text in ("0", "nan", DIGITS):
        with pytest.raises(click.BadParameter):
            WholeNumber(1).convert(text, None, None)


@pytest.mark.parametrize("option", ["--n", "--samples", "--steps"])
def test_theory_refuses_what_memory_cannot_hold(option: str, tmp_path: Path) -> None:
    result = invoked("theory", "linear", option, "1000000000000", "--out", tmp_path / "t")
    assert_refused(result, option, "GiB")
    assert not (tmp_path / "t").exists()


# ------------------------------------------------------------------------------------------------------------ places
@pytest.fixture
def impossible(tmp_path: Path) -> Path:
    """A place below a file: nobody can write there, root neither."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "below"


def test_places_are_tried_before_the_work(impossible: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    for module in walk_packages(
        robbench.__path__, "robbench."
    ):  # one first imported under a patch would keep it
        if not module.name.endswith("__main__"):
            import_module(module.name)
    for place in (
        "robbench.cli.run.build_plan",
        "robbench.store.ledger.load_run",
        "robbench.cli.check_session.load_run",
        "robbench.bundle.export.load_run",
        "robbench.bundle.runs.open_runs",
        "robbench.defenses.plan.load_dataset",
        "robbench.benchmarks.theory_report.random_gaussian",
        "robbench.models.loading.load_flow",
        "robbench.benchmarks.models.load_classifiers",
        "robbench.bundle.merge.open_bundle",
    ):
        monkeypatch.setattr(place, work)
    csv = "reports/leaderboard/digits.csv"
    commands = [
        ["run", "--attacks", "fgsm", "--model", "digits-at", "--out", impossible],
        ["train", "--defense", "standard", "--out", impossible],
        ["report", "RUN", "--out", impossible / "site"],
        ["report", "RUN", "--out", impossible / "page.html", "--single-file"],
        ["export", "RUN", "-o", impossible / "a.zip"],
        ["merge", "a.zip", "b.zip", "-o", impossible / "m"],
        ["check", "RUN", "--against", csv, "--json", impossible / "a.json"],
        ["check", "RUN", "--against", csv, "--junit", impossible / "a.xml"],
        ["check", "RUN", "--write-reference", impossible / "a.parquet", "--reason", "x"],
        ["badge", "RUN", "-o", impossible / "a.svg"],
        ["theory", "linear", "--out", impossible],
        ["samples", "--model", "digits-glow", "--under", "digits-glow", "--out", impossible],
        ["bench", "aa", "--model", "digits-at", "--out", impossible],
    ]
    for command in commands:
        assert_refused(invoked(*command), str(impossible))


def test_a_place_that_is_tried_is_left_as_it_was(tmp_path: Path) -> None:
    from robbench.core.places import check_output_file, check_output_folder

    check_output_file(tmp_path / "new" / "deep" / "a.json", "--json")
    check_output_folder(tmp_path / "other" / "deep")
    assert not list(tmp_path.iterdir())


def test_a_watched_folder_must_be_a_run(tmp_path: Path) -> None:
    assert_refused(invoked("watch", tmp_path / "nope"), "does not exist")
    assert_refused(invoked("watch", tmp_path / "nope", "--once"), "does not exist")
    assert_refused(invoked("watch", tmp_path), "holds no run")


# -------------------------------------------------------------------------------------------------------- full disks
def test_training_on_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    out = tmp_path / "t"
    words = [
        "train",
        "--defense",
        "standard",
        "--epochs",
        1,
        "--train-samples",
        64,
        "--out",
        out,
        "--device",
        "cpu",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert_refused(invoked(*words), "No space left on device")
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp"]
    assert invoked(*words).exit_code == 0


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", b"\0" * 16, b"not an idx file at all"])
def test_idx_files_that_are_none(content: bytes, tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    words = [
        "run",
        "--attacks",
        "fgsm",
        "--model",
        "fashionmnist-at",
        "--dataset",
        "fashionmnist",
        "--n",
        "4",
    ]
    assert_refused(
        invoked(*words, "--data-dir", tmp_path, "--out", tmp_path / "o"), "fashionmnist", str(tmp_path)
    )


def test_leftovers_of_killed_reports_go_with_the_next(tmp_path: Path) -> None:
    from robbench.report.site.build import _remove_leftovers, _temporary

    site = tmp_path / "si[t]e"
    with _temporary(site) as killed:
        (killed / "index.html").write_text("half")
        left = killed.with_name(killed.name + "x")
        left.mkdir()
        (left / "index.html").write_text("half")
        others = tmp_path / ".si[t]e.mine"
        others.mkdir()
        _remove_leftovers(site)
        assert killed.exists()  # in use
        assert not left.exists()
        assert others.exists()
    assert not killed.exists()
