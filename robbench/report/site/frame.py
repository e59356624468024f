"""Templates, and the frame around every page: head, header, footer, links that work from where they stand."""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache

from markupsafe import Markup

from robbench import __version__
from robbench.report.site.page import Page
from robbench.report.templating import environment

SIGNATURE = "<!-- robbench site -->"  # what every page begins with
STYLE, SCRIPT, INDEX = "assets/site.css", "assets/site.js", "assets/search.js"
PICTURE = "assets/preview.png"
ABOUT, CATALOG = "about.html", "attacks.html"
SCRIPTS = tuple(
    f"{name}.js.j2" for name in ("site", "search", "tables", "board", "scatter", "paired", "compare")
)
WHAT = {
    "board": "leaderboard",
    "model": "model",
    "attack": "attack",
    "threat": "threat model",
    "compare": "comparison",
}
_LINK = re.compile(r'\b(href|src)="site:([^"?#]*)([?#][^"]*)?"')
Address = Callable[[str, str], str]


@dataclass(frozen=True)
class Tab:
    """A data set in the header. path: of its first leaderboard; folders: of its groups."""

    name: str
    path: str
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Frame:
    """What all pages of a site have around them.

    Attributes:
        tabs: the data sets.
        published: path of the published tables; empty without.
        base_url: where the site will stand, without "/" at its end; empty where that is not known.
        date: on which the site was written.
        version: of robbench that wrote it.
    """

    tabs: tuple[Tab, ...] = ()
    published: str = ""
    base_url: str = ""
    date: str = ""
    version: str = __version__

    def url(self, path: str) -> str:
        """Public address of a page; empty without a base URL."""
        return f"{self.base_url}/{'' if path == 'index.html' else path}" if self.base_url else ""


def today() -> str:
    """The day, or that of SOURCE_DATE_EPOCH, with which the same input gives the same bytes on any day."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.fromtimestamp(int(given), UTC) if given.isdecimal() else datetime.now(UTC)
    return moment.strftime("%Y-%m-%d")


def body(template: str, **values: object) -> Markup:
    """A template of templates/site, filled in: the body of a page, or a part of one."""
    return Markup(environment().get_template(f"site/{template}").render(**values))


@cache
def style() -> str:
    """The style sheet of all pages."""
    return environment().get_template("site/site.css.j2").render()


@cache
def script() -> str:
    """The script of all pages: plain functions, no library."""
    return "\n".join(environment().get_template(f"site/{name}").render() for name in SCRIPTS)


def search_index(pages: Sequence[Page]) -> str:
    """A script that knows every page: [title, what it is, path]."""
    import json

    entries = [[page.title, _where(page), page.path] for page in pages]
    return f"robbench.index = {json.dumps(entries, ensure_ascii=False, separators=(',', ':'))};\n"


def _where(page: Page) -> str:
    """ "model, digits, seed 0, n = 360": what tells a page from its namesakes."""
    group = page.crumbs[0][0] if page.crumbs else ""
    return ", ".join(filter(None, [WHAT.get(page.kind, ""), group]))


def frame_page(page: Page, frame: Frame = Frame()) -> str:
    """A page as a file of its own; style and script are files beside it."""
    if page.path == "404.html" and frame.base_url:  # it is shown at any address that leads nowhere
        return replace_links(
            _render("page.html.j2", page, frame), lambda target, rest: f"{frame.base_url}/{target}"
        )
    return replace_links(
        _render("page.html.j2", page, frame), lambda target, rest: relative(page.path, target) + _hash(rest)
    )


def _render(template: str, page: Page, frame: Frame) -> str:
    folder = page.path.partition("/")[0]
    return (
        environment()
        .get_template(f"site/{template}")
        .render(
            page=page,
            frame=frame,
            current=next((tab for tab in frame.tabs if folder in tab.folders), None),
            style=f"site:{STYLE}",
            script=f"site:{SCRIPT}",
            picture=frame.url(PICTURE),
            about=ABOUT,
            catalog=CATALOG,
        )
    )


def frame_together(pages: list[Page], files: dict[str, str], start: str, frame: Frame = Frame()) -> str:
    """All pages in one file. files: downloads as data URIs, by path. start: path of the page that it shows first."""
    text = script()
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    def address(target: str, rest: str) -> str:
        return files.get(target) or f"#/{target}{rest.replace('#', '@')}"

    content = environment().get_template("site/content.html.j2")
    inner = [(page, _where(page), Markup(content.render(page=page))) for page in pages]
    whole = (
        environment()
        .get_template("site/single.html.j2")
        .render(
            pages=inner,
            first=next((page for page in pages if page.path == start), pages[0]),
            start=start,
            frame=frame,
            current=None,
            style=Markup(style()),
            script=Markup(text),
            script_hash=digest,
            about=ABOUT,
            catalog=CATALOG,
        )
    )
    return replace_links(whole, address)


def _hash(rest: str) -> str:
    """State lives behind "#" also in a page of its own."""
    return f"#{rest}" if rest.startswith("?") else rest


def replace_links(text: str, address: Address) -> str:
    """`text` with every "site:" link replaced by `address(path, rest)`; rest: "", "#anchor" or "?state"."""
    return _LINK.sub(lambda m: f'{m[1]}="{address(m[2], m[3] or "")}"', text)


def relative(page: str, target: str) -> str:
    """`target` as seen from `page`, both paths from the root of the site."""
    return os.path.relpath(target, os.path.dirname(page) or ".").replace(os.sep, "/")
