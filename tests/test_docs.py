"""The documentation's code runs: Python blocks, files and `robbench` commands of a page, in the order of the page.

A Python or YAML block that begins with `# NAME` (a file name) is written as that file; other Python blocks share one
namespace. Lines of `sh` blocks that begin with `robbench` or `python FILE` run in this process; others do not run.
"""

import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from robbench.cli.app import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|yaml|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text and the page's line it begins on."""

    language: str
    text: str
    line: int


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 1) for m in BLOCK.finditer(text)]


def run_commands(block: Block) -> None:
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        words = words[1:] if words[:1] == ["$"] else words
        if words[:1] == ["python"]:
            runpy.run_path(words[1], run_name="__main__")
        elif words[:1] == ["robbench"]:
            result = CliRunner().invoke(main, words[1:])
            assert result.exit_code == 0, f"line {block.line}: {line}\n{result.output}"


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_code_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    namespace: dict[str, object] = {}
    blocks = read_blocks(ROOT / page)
    assert blocks
    for block in blocks:
        if name := FILE.match(block.text):
            path = tmp_path / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), namespace)
        elif block.language == "sh":
            run_commands(block)
    for name in [name for name, module in sys.modules.items() if in_folder(module, tmp_path)]:
        del sys.modules[name]


def in_folder(module: object, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return bool(file) and os.path.commonpath([folder, os.path.abspath(file)]) == str(folder)


def test_pages_link_only_to_pages_that_exist() -> None:
    for page in ROOT.glob("docs/*.md"):
        for target in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_tables_of_results_are_what_the_leaderboards_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from result_tables import PAGES, PLACE, fill_page

    for page in PAGES:
        text = (ROOT / page).read_text()
        assert PLACE.search(text), page
        assert fill_page(text) == text, f"{page}: run python benchmarks/result_tables.py"
