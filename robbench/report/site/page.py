"""What page modules hand to `build`: pages and downloads, addressed from the root of the site.

Inside a page's body a link to another part of the site is written `href="site:PATH"` (and `src="site:PATH"`), PATH from
the root and perhaps with "#anchor" or "?state"; `build` turns it into what works from that page, or in a single file.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from markupsafe import Markup

_ANCHOR = re.compile(r'<a [^>]*href="site:([^"?#]*)"[^>]*>(.*?)</a>', re.DOTALL)


@dataclass(frozen=True)
class Provenance:
    """Where a page's numbers come from. commands: lines that compute them again. facts: (name, text) pairs: versions,
    seed, device, computing time, hashes."""

    commands: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        path: from the root of the site: "digits-seed0-n360/model-digits-at.html".
        title: its heading.
        kind: the name that its script registers with `robbench.page(kind, main => ...)`.
        body: the content of <main>.
        crumbs: (title, path) of the pages above it, outermost first, without the start page.
        provenance: where its numbers come from.
        description: the page in a sentence, for search engines and previews.
    """

    path: str
    title: str
    kind: str
    body: Markup
    crumbs: tuple[tuple[str, str], ...] = ()
    provenance: Provenance = field(default_factory=Provenance)
    description: str = ""


@dataclass(frozen=True)
class Download:
    """A file of the site that is no page; media: its MIME type."""

    path: str
    content: bytes
    media: str


Part = Page | Download


def slug(text: str) -> str:
    """A file name of letters, digits, "." and "-" for any text; not unique by itself: see `slugs`."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "unnamed"


def slugs(names: Iterable[str]) -> dict[str, str]:
    """A slug of its own for each of `names`, the same for the same names in the same order."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(names):
        plain = slug(name)
        numbered = (plain if k == 1 else f"{plain}-{k}" for k in range(1, 1_000_000))
        found[name] = next(text for text in numbered if text not in taken)
        taken.add(found[name])
    return found


def without_links(text: str, targets: Collection[str]) -> str:
    """A body whose links to `targets`, which are nowhere, are plain text that says so."""

    def plain(match: re.Match[str]) -> str:
        return (
            f'<span class="absent">{match[2]} (in the folder form only)</span>'
            if match[1] in targets
            else match[0]
        )

    return _ANCHOR.sub(plain, text) if targets else text
