"""docs/python.md: its code runs, and it names every argument."""

import inspect
import re
from pathlib import Path

import pytest

import robbench
from robbench.evaluation import EvaluationResult

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


@pytest.fixture(scope="module")
def text() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::robbench.RobbenchWarning")
def test_the_code_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "run" / "leaderboard.html").is_file()


@pytest.mark.parametrize("function", [robbench.evaluate, robbench.attack])
def test_every_argument_is_explained(function: object, text: str) -> None:
    missing = [name for name in inspect.signature(function).parameters if f"`{name}`" not in text]  # type: ignore[arg-type]
    assert not missing


def test_every_property_of_the_result_is_explained(text: str) -> None:
    public = [name for name in dir(EvaluationResult) if not name.startswith("_")]
    assert not [name for name in public if f"`{name}" not in text]
