"""Templates, and the frame around every page: head, crumbs, provenance, links that work from where they stand."""

import base64
import hashlib
import os
import re
from collections.abc import Callable
from functools import cache

from markupsafe import Markup

from robbench import __version__
from robbench.report.site.page import Page
from robbench.report.templating import environment

SIGNATURE = "<!-- robbench site -->"  # what every page begins with
STYLE, SCRIPT = "assets/site.css", "assets/site.js"
SCRIPTS = ("site.js.j2", "tables.js.j2", "board.js.j2", "paired.js.j2", "compare.js.j2")
_LINK = re.compile(r'\b(href|src)="site:([^"?#]*)([?#][^"]*)?"')


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
    found = [environment().get_template(f"site/{name}").render() for name in SCRIPTS if _exists(name)]
    return "\n".join(found)


def _exists(name: str) -> bool:
    return f"site/{name}" in environment().list_templates()


def framed(page: Page) -> str:
    """A page as a file of its own; style and script are files beside it."""
    text = (
        environment()
        .get_template("site/page.html.j2")
        .render(page=page, version=__version__, style=f"site:{STYLE}", script=f"site:{SCRIPT}")
    )
    return linked(text, lambda target, rest: relative(page.path, target) + _hash(rest))


def framed_together(pages: list[Page], files: dict[str, str], start: str) -> str:
    """All pages in one file. files: downloads as data URIs, by path. start: path of the page that it shows first."""
    text = script()
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    def address(target: str, rest: str) -> str:
        return files.get(target) or f"#/{target}{rest.replace('#', '@')}"

    content = environment().get_template("site/content.html.j2")
    inner = [(page, Markup(linked(content.render(page=page), address))) for page in pages]
    return (
        environment()
        .get_template("site/single.html.j2")
        .render(
            pages=inner,
            start=start,
            version=__version__,
            style=Markup(style()),
            script=Markup(text),
            script_hash=digest,
        )
    )


def _hash(rest: str) -> str:
    """State lives behind "#" also in a page of its own."""
    return f"#{rest}" if rest.startswith("?") else rest


def linked(text: str, address: Callable[[str, str], str]) -> str:
    """`text` with every "site:" link replaced by `address(path, rest)`; rest: "", "#anchor" or "?state"."""
    return _LINK.sub(lambda m: f'{m[1]}="{address(m[2], m[3] or "")}"', text)


def relative(page: str, target: str) -> str:
    """`target` as seen from `page`, both paths from the root of the site."""
    return os.path.relpath(target, os.path.dirname(page) or ".").replace(os.sep, "/")
