"""The site as files: what it refuses, that nothing is lost, and that the same input gives the same bytes."""

import hashlib
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from flow_runs import three_flows
from publish_runs import attack, cell, frame, make_run
from site_pages import EVIL
from site_runs import written

from robbench.cli.app import main
from robbench.report.site import build, write_single_file, write_site
from robbench.report.site.build import MARKER
from robbench.report.site.groups import site_of
from robbench.store.records import CellResult, Run


@pytest.fixture(autouse=True)
def _few(request: pytest.FixtureRequest) -> None:
    """Few published tables, but for the tests that look at them all."""
    if "all_tables" not in request.fixturenames:
        request.getfixturevalue("few_tables")


@pytest.fixture
def all_tables() -> None:
    """Every published table."""


def robbench(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, *words: str) -> None:
    """One line on stderr, exit code 2, and every word in it."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def small(models: int = 2, n: int = 30, seed: int = 1, **changes: object) -> Run:
    cells = [
        cell(f"digits-m{k}", spec, frame(n, 0.95, 0.3 + 0.1 * k, 7 * k + number + seed))
        for k in range(models)
        for number, spec in enumerate((attack(), attack("mim")))
    ]
    return replace(make_run(cells, n), **changes)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ same bytes
def test_the_same_runs_give_the_same_bytes_wherever_they_lie(run: Run, tmp_path: Path) -> None:
    folders = [written(run, tmp_path / place / "digits-run") for place in ("a", "b/c")]
    for number, folder in enumerate(folders):
        assert robbench("report", folder, "--out", tmp_path / f"site{number}").exit_code == 0
        assert (
            robbench("report", folder, "--out", tmp_path / f"{number}.html", "--single-file").exit_code == 0
        )
    first, second = (contents(tmp_path / f"site{number}") for number in (0, 1))
    assert first == second
    assert (tmp_path / "0.html").read_bytes() == (tmp_path / "1.html").read_bytes()
    secret = str(tmp_path).encode()
    assert not [name for name, content in first.items() if secret in content]
    assert secret not in (tmp_path / "0.html").read_bytes()


def test_the_marker_is_a_list_of_sha256sums(run: Run, tmp_path: Path) -> None:
    write_site([run], tmp_path / "site")
    found = contents(tmp_path / "site")
    lines = found.pop(MARKER).decode().splitlines()
    assert dict(reversed(line.split("  ", 1)) for line in lines) == {
        name: hashlib.sha256(content).hexdigest() for name, content in found.items()
    }


class Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.targets += [value for key in ("href", "src") if (value := found.get(key))]
        self.ids += [found["id"] or ""] if "id" in found else []


@pytest.mark.usefixtures("all_tables")
def test_every_link_leads_to_a_file_and_an_anchor_of_the_site(damaged: Run, tmp_path: Path) -> None:
    write_site([damaged, three_flows()], tmp_path / "site")
    root = tmp_path / "site"
    pages = {path: Links(path.read_text()) for path in root.rglob("*.html")}
    assert len(pages) > 15
    for page, links in pages.items():
        assert len(set(links.ids)) == len(links.ids), page
        for target in links.targets:
            if target.startswith("data:"):
                continue
            path, _, rest = target.partition("#")
            place = Path(os.path.normpath(page.parent / path)) if path else page
            assert place.is_file(), f"{page}: {target}"
            assert root in place.parents
            if rest and not rest.startswith("?"):
                assert rest in pages[place].ids, f"{page}: {target}"


def test_links_in_the_single_file_lead_to_its_pages(damaged: Run, tmp_path: Path) -> None:
    text = write_single_file([damaged], tmp_path / "site.html").read_text()
    paths = set(re.findall(r'<template data-path="([^"]+)"', text))
    assert "index.html" in paths
    targets = [t for t in Links(text).targets if t.startswith("#/")]
    assert {re.split("[?@]", t[2:])[0] for t in targets} <= paths
    assert '="site:' not in text


def test_a_single_file_names_what_it_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "INLINE", 60_000)
    text = write_single_file([small()], tmp_path / "site.html").read_text()
    inlined = sum(map(len, re.findall(r'href="(data:[a-z/.-]+;base64[^"]*)"', text)))
    assert 0 < inlined <= build.INLINE
    assert "(in the folder form only)" in text


# ------------------------------------------------------------------------------------------------- where it may go
def test_a_new_site_takes_the_place_of_an_older_one(run: Run, damaged: Run, tmp_path: Path) -> None:
    write_site([run], tmp_path / "site")
    old = contents(tmp_path / "site")
    write_site([damaged], tmp_path / "site")
    assert contents(tmp_path / "site") != old
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    write_site([run], tmp_path / "site")
    assert contents(tmp_path / "site") == old


def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    folder = written(small(), tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    refused(robbench("report", folder, "--out", tmp_path / "notes"), "holds something else (thesis.tex)")
    assert contents(tmp_path / "notes") == {"thesis.tex": b"years of work"}
    (tmp_path / "plain").write_text("text")
    refused(robbench("report", folder, "--out", tmp_path / "plain"), "is a file")
    assert (tmp_path / "plain").read_text() == "text"


def test_files_put_into_a_site_are_not_lost(tmp_path: Path) -> None:
    folder = written(small(), tmp_path / "run")
    site = tmp_path / "site"
    assert robbench("report", folder, "--out", site).exit_code == 0
    (site / ".git").mkdir()
    (site / ".git" / "HEAD").write_text("ref")
    before = contents(site)
    refused(robbench("report", folder, "--out", site), "robbench did not write (.git/HEAD)")
    assert contents(site) == before


def test_links_and_runs_are_no_place_for_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(small(), tmp_path / "runs" / "run")
    before = contents(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    refused(robbench("report", folder, "--out", tmp_path / "link"), "symbolic link")
    for place, words in (
        (folder, "is or lies inside"),
        (folder / "site", "is or lies inside"),
        (tmp_path / "runs", "holds the run"),
        (tmp_path / "runs" / "run" / ".." / "run", "is or lies inside"),
    ):
        refused(robbench("report", folder, "--out", place), words)
        refused(robbench("report", folder, "--out", place, "--single-file"), words)
    monkeypatch.chdir(tmp_path / "real")
    refused(robbench("report", folder, "--out", "."), "working folder")
    assert contents(tmp_path) == before


def test_a_single_file_takes_no_foreign_file_s_place(tmp_path: Path) -> None:
    folder = written(small(), tmp_path / "run")
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html><p>mine")
    refused(robbench("report", folder, "--out", mine, "--single-file"), "is no page of robbench")
    assert mine.read_text() == "<!doctype html><p>mine"
    (tmp_path / "link.html").symlink_to(mine)
    refused(robbench("report", folder, "--out", tmp_path / "link.html", "--single-file"), "symbolic link")
    refused(robbench("report", folder, "--out", tmp_path, "--single-file"), "holds the run")
    refused(robbench("report", folder, "--single-file"), "--out report.html")
    assert robbench("report", folder, "--out", tmp_path / "new.html", "--single-file").exit_code == 0
    again = robbench("report", folder, "--out", tmp_path / "new.html", "--single-file")
    assert again.exit_code == 0
    assert re.search(r"HTML .*new\.html\n +[0-9.]+ MB\n", again.output)


def test_a_failure_leaves_the_old_site(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_site([run], tmp_path / "site")
    before = contents(tmp_path / "site")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".site.") and Path(target).name == "site":
            raise OSError(28, "No space left on device", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        write_site([run], tmp_path / "site")
    assert contents(tmp_path / "site") == before
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


# ---------------------------------------------------------------------------------------------------------- inputs
def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        refused(robbench("report", path, "--out", tmp_path / "site"), "not a run folder")
    refused(robbench("report", tmp_path / "nowhere", tmp_path / "empty"), "not a run folder")
    assert not (tmp_path / "site").exists()


def test_a_run_that_has_no_sample_yet_is_shown_as_such(tmp_path: Path) -> None:
    whole = small()
    waiting = [
        CellResult(r.cell.model_copy(update={"status": "running"}), r.rows.iloc[:0]) for r in whole.cells
    ]
    folder = written(replace(whole, cells=waiting), tmp_path / "run")
    assert robbench("report", folder, "--out", tmp_path / "site").exit_code == 0
    assert "partial: 0 of 4 cells done" in (tmp_path / "site" / "about.html").read_text()
    assert "4 cells without a number" in (tmp_path / "site" / "index.html").read_text()


def test_a_run_still_being_written_is_partial_and_a_failed_cell_failed(damaged: Run, tmp_path: Path) -> None:
    folder = written(damaged, tmp_path / "run")
    assert robbench("report", folder, "--out", tmp_path / "site").exit_code == 0
    assert "1 failed, partial: 4 of 6 cells done" in (tmp_path / "site" / "about.html").read_text()
    text = (tmp_path / "site" / "index.html").read_text()
    assert "sample 3 is 0.01 outside the linf ball" in text
    assert "50 of 120 samples done" in text


def test_a_ledger_of_a_newer_robbench_is_left_alone(tmp_path: Path) -> None:
    folder = written(small(), tmp_path / "run")
    path = folder / "run.yaml"
    path.write_text(path.read_text().replace("schema_version: 2", "schema_version: 9"))
    refused(robbench("report", folder, "--out", tmp_path / "site"), "newer robbench", "schema 9")
    assert not (tmp_path / "site").exists()


def test_runs_of_other_data_have_groups_of_their_own(tmp_path: Path) -> None:
    digits, other = small(), small(dataset="mnist", dataset_revision="e" * 64)
    found = site_of([digits, other])
    assert [group.title for group in found.groups] == ["digits, seed 3, n = 30", "mnist, seed 3, n = 30"]
    write_site([digits, other], tmp_path / "site")
    text = (tmp_path / "site" / "index.html").read_text()
    assert text.index(">digits</a>") < text.index(">mnist</a>")


def test_groups_that_only_versions_tell_apart_have_names_of_their_own() -> None:
    first = small()
    second = replace(small(seed=5), versions={"robbench": "0.2.0"}, folder=Path("runs/second"))
    third = replace(small(seed=9), versions={"robbench": "0.3.0"}, folder=Path("runs/second"))
    groups = site_of([first, second, third]).groups
    assert len({group.title for group in groups}) == len({group.slug for group in groups}) == 3
    assert "second" in groups[1].title


def test_runs_of_the_same_samples_share_their_tables() -> None:
    first, second = small(), small(models=3)
    group, *others = site_of([first, second]).groups
    assert not others
    assert [model.name for model in group.models] == ["digits-m0", "digits-m1", "digits-m2"]


def test_a_cell_of_two_runs_is_taken_where_it_is_done(run: Run, damaged: Run) -> None:
    """A run that failed or was stopped, and the same one finished elsewhere, in either order."""
    for given in ((damaged, run), (run, damaged)):
        (group,) = site_of(given).groups
        assert [(r.cell.model, r.cell.attack.label) for r in group.run.cells] == [
            (r.cell.model, r.cell.attack.label) for r in run.cells
        ]
        assert all(r.cell.status == "ok" and len(r.rows) == run.n for r in group.run.cells)


def test_a_run_given_twice_counts_once(tmp_path: Path) -> None:
    folder = written(small(), tmp_path / "run")
    bundle = tmp_path / "run.zip"
    assert robbench("export", folder, "-o", bundle).exit_code == 0
    for number, inputs in enumerate(([folder], [folder, folder], [folder, bundle])):
        done = robbench("report", *inputs, "--out", tmp_path / f"site{number}")
        assert done.exit_code == 0, done.output
    first, *others = (contents(tmp_path / f"site{number}") for number in range(3))
    assert all(other == first for other in others)


def test_a_bundle_gives_the_site_of_its_run(tmp_path: Path) -> None:
    folder = written(small(), tmp_path / "digits-run")
    bundle = tmp_path / "digits-run.zip"
    assert robbench("export", folder, "-o", bundle).exit_code == 0
    assert robbench("report", folder, "--out", tmp_path / "a").exit_code == 0
    assert robbench("report", bundle, "--out", tmp_path / "b").exit_code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    refused(robbench("report", bundle, "--published"), "--out")
    printed = robbench("report", bundle)
    assert printed.exit_code == 0
    assert "digits-m0" in printed.output
    refused(robbench("report", folder, bundle, "--out", bundle), "is or lies inside")


def test_names_are_text_everywhere(tmp_path: Path) -> None:
    """In the names of models, defenses, attacks, data sets and notes nothing is markup."""
    spec = attack(EVIL)
    cells = [
        cell(f"{EVIL}{k}", spec, frame(30, 0.9, 0.5, k), defense=EVIL, error=EVIL, suspicions=(EVIL,))
        for k in (1, 2)
    ]
    failed = cell(f"{EVIL}1", attack("mim"), frame(30, 0.9, 0.5, 3).iloc[:0], status="failed", error=EVIL)
    evil = replace(
        make_run([*cells, failed], 30),
        dataset=EVIL,
        note=EVIL,
        versions={"robbench": EVIL},
        folder=Path(EVIL),
    )
    write_site([evil], tmp_path / "site")
    single = write_single_file([evil], tmp_path / "site.html")
    for path in (*(tmp_path / "site").rglob("*.html"), single):
        text = path.read_text()
        assert "<script>alert" not in text, path
        assert "<img src=x" not in text, path


def test_the_command_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "from robbench.cli.app import main; main(['report', 'nowhere', '--out', 'site'], standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=False
    )
    assert "robbench.store.ledger" in done.stderr
    assert not re.search(r"\| +(torch|matplotlib)$", done.stderr, re.MULTILINE)


def test_names_of_defenses_are_those_of_the_registries() -> None:
    from robbench.defenses import DEFENSES, FLOW_DEFENSES
    from robbench.report.published_page import find_known_names

    assert {name for registry in (DEFENSES, FLOW_DEFENSES) for name in registry} <= set(
        find_known_names().defenses
    )


def test_a_site_is_readable_by_everybody(run: Run, tmp_path: Path) -> None:
    write_site([run], tmp_path / "site")
    assert (tmp_path / "site").stat().st_mode & 0o777 == 0o755
    shutil.rmtree(tmp_path / "site")


# ------------------------------------------------------------------------------------------------------ on a server
def test_a_site_whose_address_is_known_has_what_github_pages_and_previews_read(tmp_path: Path) -> None:
    folder = written(small(), tmp_path / "run")
    url = "https://example.org/bench"
    done = robbench("report", folder, "--out", tmp_path / "site", "--base-url", f"{url}/")
    assert done.exit_code == 0, done.output
    root = tmp_path / "site"
    assert (root / ".nojekyll").is_file()
    assert (root / "assets/preview.png").read_bytes().startswith(b"\x89PNG")
    pages = {path.relative_to(root).as_posix() for path in root.rglob("*.html")} - {"404.html"}
    listed = re.findall("<loc>(.*?)</loc>", (root / "sitemap.xml").read_text())
    assert {one.removeprefix(f"{url}/") or "index.html" for one in listed} == pages
    for path in pages:
        text = (root / path).read_text()
        address = f"{url}/" + ("" if path == "index.html" else path)
        assert f'<link rel="canonical" href="{address}">' in text
        assert f'<meta property="og:url" content="{address}">' in text
        assert f'content="{url}/assets/preview.png"' in text
    missing = Links((root / "404.html").read_text()).targets
    assert all(one.startswith((f"{url}/", "#", "data:")) for one in missing), "it is shown at any depth"


@pytest.mark.parametrize(
    "url", ["example.org/x", "ftp://example.org", "https://", "https://a.b/?q", 'https://a.b/"><x']
)
def test_what_is_no_address_is_refused_before_work(tmp_path: Path, url: str) -> None:
    refused(
        robbench("report", written(small(), tmp_path / "run"), "--out", tmp_path / "site", "--base-url", url),
        "--base-url",
    )
    assert not (tmp_path / "site").exists()


def test_a_base_url_is_for_a_folder(tmp_path: Path) -> None:
    folder = written(small(), tmp_path / "run")
    refused(robbench("report", folder, "--base-url", "https://a.b"), "--out SITE")
    refused(
        robbench(
            "report", folder, "--out", tmp_path / "x.html", "--single-file", "--base-url", "https://a.b"
        ),
        "--out SITE",
    )


def test_a_date_that_is_given_is_the_date_of_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    write_site([small()], tmp_path / "site")
    assert "robbench 0.1.0, 1970-01-01" in (tmp_path / "site" / "index.html").read_text()
