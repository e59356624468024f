"""`run --config`: options from a file, a run repeated from its run.yaml, and help in groups."""

from pathlib import Path

import click
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner, Result

from robbench.cli.app import main
from robbench.cli.help import RUN, TRAIN, VERIFY
from robbench.store.ledger import load_run


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write(path: Path, **options: object) -> Path:
    path.write_text(yaml.safe_dump({name.replace("_", "-"): value for name, value in options.items()}))
    return path


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/shard-*")}


def test_a_run_is_repeated_from_its_run_yaml(tiny_zoo: Path, in_tmp: Path) -> None:
    file = write(
        in_tmp / "mine.yaml",
        zoo=str(tiny_zoo),
        model=["tiny-a"],
        attacks="fgsm,pgd10",
        n=20,
        out="x",
        epsilon=[0.1, "1/8"],
    )
    first = invoked("run", "--config", file, "--out", "first", "--epsilon", "0.05", "--epsilon", "1/16")
    assert first.exit_code == 0, first.stderr
    assert not Path("x").exists(), "the command line goes first"
    done = load_run(Path("first"))
    assert [one.cell.attack.epsilon for one in done.cells] == [0.05, 0.05, 0.0625, 0.0625]
    assert done.options == {
        "attacks": ["fgsm,pgd10"],
        "model": ["tiny-a"],
        "n": 20,
        "zoo": str(tiny_zoo),
        "epsilon": ["0.05", "1/16"],
    }
    before = stamps(Path("first"))
    moved = Path("first").rename("moved")
    again = invoked("run", "--config", moved / "run.yaml")
    assert again.exit_code == 0, again.stderr
    assert not Path("first").exists()
    assert {path.name: stamp for path, stamp in stamps(moved).items()} == {
        p.name: s for p, s in before.items()
    }
    assert "20 of them in the ledger" in again.output
    assert load_run(moved).options == done.options
    other = invoked("run", "--config", moved, "--out", "other")
    assert other.exit_code == 0, other.stderr
    for one, two in zip(load_run(moved).cells, load_run(Path("other")).cells, strict=True):
        assert one.cell.hash == two.cell.hash
        pd.testing.assert_frame_equal(one.rows, two.rows)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("atacks: pgd20", "unknown key of mine.yaml: 'atacks'; did you mean 'attacks'?"),
        ("batch_size: 3", "did you mean 'batch-size'?"),
        ("config: x.yaml", "unknown key of mine.yaml: 'config'"),
        ("n: 30.5", "--n"),
        ("n: true", "key n: is True, which is no value"),
        ("n:", "key n: is None"),
        ("attacks: {a: b}", "key attacks: is {'a': 'b'}"),
        ("attacks: [[pgd20]]", "key attacks: is ['pgd20']"),
        ("compile: 1", "key compile: is 1; give true or false"),
        ("backend: cloud", "--backend"),
        ("7: 8", "unknown key of mine.yaml: '7'"),
        ("- a", "holds no options"),
        ("", "holds no options"),
        ("a: [", "is not valid YAML"),
        ("n: 3\nn: 4", "given twice"),
        ("dataset_revision: x", "does not say how it was run"),
        ("attacks: []\nmodel: tiny-a", "--attacks"),
    ],
)
def test_files_that_are_refused(content: str, part: str, in_tmp: Path) -> None:
    Path("mine.yaml").write_text(content, encoding="utf-8")
    result = invoked("run", "--config", "mine.yaml", "--out", "out")
    assert result.exit_code == 2, result.output
    assert part in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("out").exists()


def test_an_absent_file(in_tmp: Path) -> None:
    assert "cannot be read" in invoked("run", "--config", "absent.yaml").stderr


def test_fresh_and_resume_are_two_words_for_one_option(tiny_zoo: Path, in_tmp: Path) -> None:
    file = write(
        in_tmp / "a.yaml", zoo=str(tiny_zoo), model="tiny-a", attacks="fgsm", n=5, out="run", fresh=True
    )
    for _ in range(2):
        assert invoked("run", "--config", file).exit_code == 0
    assert Path("run/superseded-1").is_dir()
    assert invoked("run", "--config", file, "--resume").exit_code == 0
    assert not Path("run/superseded-2").exists()
    assert "fresh" not in load_run(Path("run")).options


@pytest.mark.parametrize(
    ("name", "groups"), [("run", RUN), ("train", TRAIN), ("verify", VERIFY), ("merge", VERIFY)]
)
def test_help_has_every_option_once_and_the_common_ones_first(
    name: str, groups: dict[str, tuple[str, ...]]
) -> None:
    command = main.commands[name]
    shown = invoked(name, "--help").output
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    lines = [line.strip() for line in shown.splitlines()]
    for option in options:
        text = option.opts[-1]
        found = [
            line
            for line in lines
            if line.startswith(("-",))
            and text in line.split("  ")[0].replace(",", " ").replace("/", " ").split()
        ]
        assert len(found) == 1, text
    assert shown.index("Common options:") < shown.index("Other options:")
    common = [line.split()[0] for line in lines[lines.index("Common options:") + 1 :] if line.startswith("-")]
    if name == "run":
        assert common[:10] == [f"--{one}" for one in groups["Common options"]]


def test_no_command_lists_more_than_twelve_options_in_one_heap() -> None:
    def commands(group: click.Command) -> list[click.Command]:
        parts = group.commands.values() if isinstance(group, click.Group) else ()
        return [group, *(one for part in parts for one in commands(part))]

    for command in commands(main):
        shown = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
        assert len(shown) <= 12 or hasattr(command, "groups"), command.name
