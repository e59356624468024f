"""The examples for a user's repository (docs/ci.md): valid YAML, and their commands run from the first to the last."""

import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from robbench.cli.app import main

ROOT = Path(__file__).parents[1]
PATH, PAGE = ROOT / "examples" / "github-workflow.yml", ROOT / "docs" / "ci.md"
RUN_ALL = "robbench run --model model/card.yaml --dataset cifar10 --attacks pgd20,aa --n 100 --out run"
# What makes the examples small: the tests' own data, fewer samples, one gradient attack for an ensemble.
SMALL = (("cifar10", "digits"), ("--n 100", "--n 12"), ("pgd20,aa", "pgd20,fgsm"), ("aa=45", "fgsm=0"))
SMALL += (("pgd20=45", "pgd20=0"), ("clean=80", "clean=20"))


def read_yaml(text: str) -> dict[Any, Any]:
    content = yaml.safe_load(text)
    assert isinstance(content, dict)
    return content


def workflow() -> dict[Any, Any]:
    return read_yaml(PATH.read_text(encoding="utf-8"))


def page_examples() -> dict[str, dict[Any, Any]]:
    """The YAML blocks of the page by the heading above them."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {text.split("\n", 1)[0]: re.search(r"```yaml\n(.*?)```", text, re.DOTALL) for text in sections}
    return {name: read_yaml(block[1]) for name, block in found.items() if block}


def robbench_commands(lines: list[str]) -> list[str]:
    return [part.strip() for line in lines for part in line.split(" && ") if part.startswith("robbench ")]


def github_commands() -> list[str]:
    steps = [step for job in workflow()["jobs"].values() for step in job["steps"]]
    return robbench_commands([line for step in steps for line in str(step.get("run", "")).splitlines()])


def baseline_commands() -> list[str]:
    """How the comment of the workflow says to begin; the page says the same."""
    comments = [line.removeprefix("#").strip() for line in PATH.read_text().splitlines() if line[:1] == "#"]
    page = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    robbench ")]
    assert page[:2] == robbench_commands(comments)
    return page[:2]


def hook_commands() -> list[str]:
    (hook,) = page_examples()["pre-commit"]["repos"][0]["hooks"]
    shell, option, script = shlex.split(hook["entry"])
    assert (shell, option, hook["pass_filenames"]) == ("sh", "-c", False)
    return robbench_commands([script])


def invoked(command: str) -> Result:
    for what, small in SMALL:
        command = command.replace(what, small)
    return CliRunner().invoke(main, shlex.split(command)[1:])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a model and the baseline that the workflow's comment makes."""
    sys.path.append(str(ROOT / "tests" / "matrix"))
    try:
        from tiny_models import saved_model, trained_classifier
    finally:
        sys.path.pop()
    folder = tmp_path_factory.mktemp("repository")
    saved_model(folder, "model", trained_classifier(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in baseline_commands():
            done = invoked(command)
            assert done.exit_code == 0, done.output
    return folder


def test_the_github_workflow_runs_from_the_first_command_to_the_last(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(repository / "summary.md"))
    assert [command.split()[1] for command in github_commands()] == ["run", "diff", "report", "badge"]
    for command in github_commands():
        done = invoked(command)
        assert done.exit_code == 0, f"{command}\n{done.output}"
    assert (
        "Nothing fell beyond its interval. 0 minimums of 2 missed." in (repository / "summary.md").read_text()
    )
    steps = workflow()["jobs"]["check"]["steps"]
    kept = next(step["with"]["path"].split() for step in steps if "upload-artifact" in step.get("uses", ""))
    for path in kept:
        assert (repository / path).exists(), path


def test_the_gitlab_job_runs(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    job = page_examples()["GitLab"]["robustness"]
    assert job["script"][0] == RUN_ALL
    for command in job["script"]:
        done = invoked(command)
        assert done.exit_code == 0, f"{command}\n{done.output}"
    assert (repository / job["artifacts"]["reports"]["junit"]).is_file()


def test_the_hook_runs_and_fails_where_a_minimum_is_missed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    run, diff = hook_commands()
    for command in (run, diff):
        done = invoked(command)
        assert done.exit_code == 0, f"{command}\n{done.output}"
    assert invoked(diff.replace("pgd20=45", "pgd20=100")).exit_code == 1


def test_it_is_a_workflow() -> None:
    for path, events in (
        (PATH, {"pull_request", "push"}),
        (ROOT / ".github/workflows/release.yml", {"push"}),
    ):
        content = read_yaml(path.read_text(encoding="utf-8"))
        assert set(content[True]) == events  # YAML 1.1 reads the key "on" as true
        for job in content["jobs"].values():
            assert job["runs-on"] == "ubuntu-latest"
            assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        needed = {job["needs"] for job in content["jobs"].values() if "needs" in job}
        assert needed <= set(content["jobs"])


def test_no_page_installs_robbench_from_an_index() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", PATH, *(ROOT / "docs").glob("*.md")]
    installed = re.compile(r"pip install [^\n|&]*['\" ]robbench\b")
    assert not [page.name for page in pages if installed.search(page.read_text(encoding="utf-8"))]
    assert "git+https://github.com/OWNER/REPOSITORY" in workflow()["jobs"]["check"]["env"]["ROBBENCH"]


def test_the_citation_is_of_this_version() -> None:
    """The keys that CFF 1.2.0 requires, an entity as author, no key that it does not have."""
    content = read_yaml((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    allowed = {"type", "version", "license", "abstract", "keywords"}
    assert set(content) <= {"cff-version", "message", "title", "authors"} | allowed
    assert (content["cff-version"], content["version"]) == ("1.2.0", project["version"])
    assert (content["license"], content["authors"]) == (
        project["license"],
        [{"name": "The robbench authors"}],
    )
