"""Nothing that others wrote steers a terminal: cards, threat models, plugins, errors, on a pty and through a pipe."""

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import hostile
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

import robbench
from robbench.cli.app import main
from robbench.cli.base import echo_cells, echo_line, echo_text
from robbench.core.errors import printable, printable_text
from robbench.core.resources import data_root
from robbench.core.terminal import Terminal, print_line
from robbench.run.progress import LiveProgress, PlainProgress

ROOT = Path(robbench.__file__).parent
# What prints as it is: the helpers themselves, a script for a shell, an image, and the JSON of a worker's protocol.
PRINTERS = {
    "cli/base.py": {"echo_line", "echo_text", "echo_cells", "print_json"},
    "cli/completion.py": {"completion"},
    "cli/badge.py": {"badge"},
    "benchmarks/flows.py": None,
    "core/terminal.py": None,
}


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model whose every free text is hostile; its weights are absent."""
    folder = tmp_path_factory.mktemp("zoo")
    card = yaml.safe_load((data_root() / "zoo" / "digits-at" / "card.yaml").read_text(encoding="utf-8"))
    card |= {"name": "foreign", "description": hostile.ALL, "defense": hostile.ALL, "dataset": hostile.ALL}
    card |= {
        "license": hostile.ALL,
        "source": hostile.ALL,
        "golden": None,
        "training": None,
        "measurements": [],
    }
    card["weights"] = {"file": "gone.safetensors", "sha256": "0" * 64, "urls": ["http://127.0.0.1:9/\u202ex"]}
    written(folder / "foreign" / "card.yaml", card)
    return folder


@pytest.fixture(scope="module")
def threat_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threat-models")
    content = yaml.safe_load((data_root() / "threat_models" / "linf.yaml").read_text(encoding="utf-8"))
    attack = next(iter(content["attacks"].values()))
    attack |= {"description": hostile.ALL, "reference": hostile.ALL}
    budgets = {name: {**budget, "note": hostile.ALL} for name, budget in content["budgets"].items()}
    content |= {"name": "foreign", "description": hostile.ALL, "budgets": budgets}
    content |= {"attacks": {"foreign-attack": attack}, "groups": {}}
    written(folder / "foreign.yaml", content)
    return folder


def commands(zoo: Path, threat_models: Path) -> list[list[str]]:
    models, threats = ["--zoo", str(zoo)], ["--threat-models", str(threat_models)]
    return [
        ["list", "models", *models],
        ["show", "foreign", *models],
        ["list", "attacks", *threats],
        ["list", "threat-models", *threats],
        ["show", "foreign-attack", *threats],
        ["show", "foreign", *threats],
        ["show", hostile.ALL.replace("\0", "")],
        ["list", hostile.RED + hostile.BIDI],
        ["run", "--model", hostile.LINK, "--attacks", hostile.C1],
        ["watch", hostile.TITLE, "--once"],
        ["verify", hostile.ALL.replace("/", "")[:80]],
    ]


@pytest.mark.parametrize("number", range(11))
def test_through_a_pipe(number: int, zoo: Path, threat_models: Path) -> None:
    arguments = commands(zoo, threat_models)[number]
    result = CliRunner().invoke(main, arguments)
    assert not hostile.steering(result.output), arguments
    assert "\nEverything required works." not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "evil.example" in result.output or number >= 7


def test_a_row_is_a_line_and_a_tab_a_cell(zoo: Path) -> None:
    rows = CliRunner().invoke(main, ["list", "models", "--zoo", str(zoo)]).output.splitlines()
    assert {row.count("\t") for row in rows} == {4}
    assert sum(row.startswith("foreign\t") for row in rows) == 1


@pytest.mark.parametrize("command", [0, 1, 2, 4, 7])
def test_on_a_terminal(command: int, zoo: Path, threat_models: Path) -> None:
    arguments = commands(zoo, threat_models)[command]
    code, output = hostile.on_a_terminal(arguments)
    assert code == (2 if command == 7 else 0)
    assert not hostile.steering(output)
    assert not hostile.links(output)


def test_doctor_on_a_terminal(zoo: Path) -> None:
    """It names the source of absent weights, and cannot be made to say that all is well."""
    code, output = hostile.on_a_terminal(["doctor", "--zoo", str(zoo)])
    assert code in (0, 1)
    assert not hostile.steering(output)
    assert not hostile.links(output)
    assert len(re.findall(r"^Everything required works\.|^Something required is broken", output, re.M)) == 1


def test_json_is_ascii(zoo: Path) -> None:
    """A terminal shows JSON too: what steers it is escaped there by JSON's own means."""
    output = CliRunner().invoke(main, ["show", "foreign", "--zoo", str(zoo), "--json"]).output
    assert output.isascii()
    assert not hostile.steering(output)


# ---------------------------------------------------------------------------------------------------- properties
@given(st.text(st.characters(exclude_categories=())))
def test_printable_is_one_harmless_line_that_keeps_what_is_harmless(text: str) -> None:
    shown = printable(text)
    assert not hostile.steering(shown)
    assert len(shown.splitlines()) <= 1
    assert "\t" not in shown
    if text.isprintable():
        assert shown == text
    shown.encode()


@given(st.text(st.characters(exclude_categories=())))
def test_printable_text_keeps_lines_alone(text: str) -> None:
    assert not hostile.steering(printable_text(text))
    assert printable_text(text).count("\n") == text.count("\n")


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_whatever_a_console_shows_is_harmless(text: str) -> None:
    console = Terminal(file=io.StringIO(), force_terminal=True, width=60, color_system="standard")
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    table.add_row(Text(text))
    for shown in (table, Text(text), text):
        console.print(shown)
    print_line(console, text, "bold red")
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert not hostile.steering(output)
    assert not hostile.links(output)


def test_markup_of_others_is_text() -> None:
    console = Terminal(file=io.StringIO(), force_terminal=True, width=200)
    table = Table()
    table.add_column("model")
    table.add_row("[link=http://evil.example]x[/link] [bold]y")
    console.print(table)
    print_line(console, "[link=http://evil.example]x[/link] :100:")
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert not hostile.links(output)
    assert output.count("[link=http://evil.example]x[/link]") == 2
    assert ":100:" in output


def test_progress_takes_no_orders() -> None:
    """The live table reads no markup in names, a failure shows as such, and its reason stays on its line."""
    record = SimpleNamespace(
        model="[blink]m[/blink]" + hostile.LINK,
        attack=SimpleNamespace(label="[link=http://evil.example]pgd[/link]"),
        status="failed",
        error="boom\n[2/2] m x pgd: 99.9 % of 100, 1.0 s" + hostile.C1,
    )
    records: Any = [record]
    for kind in (LiveProgress, PlainProgress):
        console = Terminal(
            file=io.StringIO(), force_terminal=kind is LiveProgress, width=140, color_system="standard"
        )
        with kind(console, records, 10) as progress:
            progress.on_start(0, records[0], 0)
            progress.on_end(0, records[0], 0, "")
        output = console.file.getvalue()  # type: ignore[attr-defined]
        assert not hostile.steering(output)
        assert not hostile.links(output)
        assert not re.search(r"^\[2/2\]", output, re.M)
        assert "failed" in output


# ------------------------------------------------------------------------------------------------------ one place
class _Prints(ast.NodeVisitor):
    """Calls that print, with the function that they are in."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, int]] = []
        self._inside = [""]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._inside.append(node.name)
        self.generic_visit(node)
        self._inside.pop()

    def visit_Call(self, node: ast.Call) -> None:
        text = ast.unparse(node.func)
        if text in ("click.echo", "click.secho", "print", "Console", "sys.stdout.write", "sys.stderr.write"):
            self.found.append((text, self._inside[-1], node.lineno))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if ast.unparse(node) in ("click.echo", "click.secho"):  # also handed on without a call
            self.found.append((ast.unparse(node), self._inside[-1], node.lineno))
        self.generic_visit(node)


def printers() -> Iterator[str]:
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if "_data" in path.parts or PRINTERS.get(name, ()) is None:
            continue
        visitor = _Prints()
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
        for what, function, line in visitor.found:
            if function not in (PRINTERS.get(name) or ()):
                yield f"{name}:{line}: {what} in {function}"


def test_everything_is_printed_through_one_place() -> None:
    """`echo_line`, `echo_text`, `echo_cells` and `Terminal` escape; nothing prints beside them."""
    assert list(printers()) == []


def test_the_helpers_escape() -> None:
    @click.command()
    def shown() -> None:
        echo_line(hostile.ALL + hostile.HALF)
        echo_text(hostile.ALL + hostile.HALF)
        echo_cells(["a\tb", hostile.ALL])
        echo_line(hostile.ALL, err=True)

    output = CliRunner().invoke(shown, [], catch_exceptions=False).output
    assert not hostile.steering(output)
    assert len(output.splitlines()) == 5
