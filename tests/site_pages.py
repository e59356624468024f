"""A site in a real browser, for the tests of its pages: built from runs, opened offline, read by axe-core.

Fixtures (offered to every test of this folder by conftest.py):
* `chromium`: headless Chromium; skips with the reason where there is none.
* `site`: a `Reader`. `site.build(run)` writes the site of runs, `site.open("GROUP/index.html")` opens a page of it.
  When the test ends, no page may have logged, failed or asked anybody for anything.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from robbench.report import published_page
from robbench.report.site import build, write_single_file, write_site
from robbench.report.site.build import write_run_page
from robbench.report.site.groups import Site
from robbench.report.site.page import Page, Part
from robbench.store.records import Run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
PHONE, DESK = 390, 1280
Pages = Callable[[Site], Iterator[Part]]
LOOKS = ((DESK, "light"), (PHONE, "dark"))
TABLES = ("ijsat-table1", "er-table1")  # published tables of a site with `few_tables`
AXE_OPTIONS = {"resultTypes": ["violations"], "preload": False}  # preloading would fetch style sheets
GRAVE = ("serious", "critical")
START = "index.html"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Headless Chromium, one a process of pytest; every page of a test has a context of its own."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def few_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two published tables in the place of all: what a test of other pages would only wait for."""
    index = published_page.published_index()
    few = index.model_copy(update={"tables": tuple(t for t in index.tables if t.name in TABLES)})
    monkeypatch.setattr(published_page, "published_index", lambda: few)
    monkeypatch.setattr(published_page, "find_known_names", _known_names)


_known_names = cache(published_page.find_known_names)


def only(*modules: ModuleType) -> Pages:
    """The pages of some page modules, with what `build` ends them with: for a test that looks at no others."""

    def parts(site: Site) -> Iterator[Part]:
        endings = build._endings(site)
        for module in modules:
            for part in module.parts(site):
                ends = isinstance(part, Page) and part.path in endings
                yield replace(part, body=part.body + endings[part.path]) if ends else part

    return parts


@pytest.fixture
def site(chromium: Any, tmp_path: Path) -> Iterator["Reader"]:
    """Builds and opens sites; afterwards nothing may have gone wrong and nothing have been fetched."""
    reader = Reader(chromium, tmp_path / "site")
    yield reader
    reader.close()


@dataclass
class Reader:
    """A site on disk and the pages opened from it.

    troubles: console messages, errors and dialogs; a test that expects one takes it out. requests: every address asked
    for.
    """

    browser: Any
    folder: Path
    troubles: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _contexts: list[Any] = field(default_factory=list)
    _start: Path | None = None

    def build(self, *runs: Run, single: bool = False, pages: Pages | None = None) -> Path:
        """Write the site of `runs`; returns its start page. single: as one file. pages: the `parts` of a single page
        module, to write its pages alone."""
        with pytest.MonkeyPatch.context() as patch:
            if pages is not None:
                patch.setattr(build, "parts", pages)
            if single:
                self._start = write_single_file(runs, self.folder.with_suffix(".html"))
            else:
                self._start = write_site(runs, self.folder)
        return self._start

    def write_run(self, run: Run) -> None:
        """Write the page that a run folder holds; `open("")` shows what a reader sees first."""
        self._start = write_run_page(run, self.folder.with_name("leaderboard.html"))

    def open_run(self, run: Run, **how: Any) -> Any:
        """Write the page of a run and open it as a reader does; how: as for `open`."""
        self.write_run(run)
        return self.open("", **how)

    def address(self, path: str = START, state: str = "") -> str:
        """file:// address of a page by its path from the root. state: what follows "#?", as "sort=clean"."""
        assert self._start is not None, "site.build(run) first"
        if self._start.name == START:
            return (self.folder / path).as_uri() + (f"#?{state}" if state else "")
        return f"{self._start.as_uri()}#/{path}" + (f"?{state}" if state else "")

    def open(
        self,
        path: str = START,
        *,
        state: str = "",
        width: int = DESK,
        scheme: str = "light",
        scripts: bool = True,
        downloads: bool = False,
    ) -> Any:
        """A Playwright page, its scripts done. path: from the root of the site, as `group.board_path()`."""
        context = self.browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            java_script_enabled=scripts,
            accept_downloads=downloads,
        )
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: self.troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("dialog", self._dismissed)
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(self.address(path, state), timeout=60_000)
        if scripts:
            page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
        return page

    def _dismissed(self, dialog: Any) -> None:
        self.troubles.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def close(self) -> None:
        """Close all pages; AssertionError for any trouble and for any request that left the machine's files."""
        for context in self._contexts:
            context.close()
        assert self.troubles == [], "\n".join(self.troubles)
        outside = [url for url in self.requests if not url.startswith(("file://", "data:", "blob:"))]
        assert outside == [], "\n".join(outside)

    def assert_accessible(
        self,
        path: str,
        prepare: Callable[[Any], None] | None = None,
        looks: Sequence[tuple[int, str]] = LOOKS,
    ) -> None:
        """No serious or critical violation in any of `looks` (width, colour scheme), by default at the desk in light
        and on a phone in dark, and the page never scrolls sideways. prepare(page): brings each page into the state to
        look at (opens its menus, say)."""
        for width, scheme in looks:
            page = self.open(path, width=width, scheme=scheme)
            if prepare is not None:
                prepare(page)
            where = f"{path} at {width} px, {scheme}"
            found = violations(page)
            assert found == [], "\n".join([where, *found])
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (
                f"{where}: scrolls sideways"
            )


def violations(page: Any) -> list[str]:
    """What axe-core finds serious or critical on an open page: "color-contrast (serious): <td> ..." """
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    )
    found = (
        axe.Axe().run(page, options={"resultTypes": ["violations"], "preload": False}).response["violations"]
    )
    return [
        f"{rule['id']} ({rule['impact']}): {node['html'][:200]}"
        for rule in found
        if rule["impact"] in GRAVE
        for node in rule["nodes"][:5]
    ]
