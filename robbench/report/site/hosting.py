"""What a web server, search engines and link previews read of a site whose address is known."""

import io
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from robbench.core.errors import UserError
from robbench.core.resources import utf8
from robbench.report.site.boards import boards
from robbench.report.site.frame import PICTURE, Frame
from robbench.report.site.groups import Site
from robbench.report.site.page import Download, Page, Part
from robbench.report.site.scatter import Scatter

MISSING = Markup(
    '<p>There is no such page here. <a href="site:index.html">To the start</a>, or search above.</p>'
)


def check_base_url(url: str) -> str:
    """`url` without "/" at its end; `UserError` unless it is an address that a site can have."""
    from urllib.parse import urlsplit

    found = urlsplit(url)
    plain = not found.query and not found.fragment and not set(url) & set(" \"'<>\\\\")
    if found.scheme not in ("http", "https") or not found.netloc or not plain:
        raise UserError(
            f"--base-url {url!r} is no address of a folder; give one as https://NAME.github.io/PROJECT"
        )
    return url.rstrip("/")


def parts(pages: Sequence[Page], frame: Frame, site: Site) -> Iterator[Part]:
    """The files: no Jekyll on GitHub Pages, every page for search engines, a page for wrong addresses, a picture."""
    yield Download(".nojekyll", b"", "text/plain")
    yield Download("sitemap.xml", _sitemap(pages, frame), "application/xml")
    yield Download(
        "robots.txt", utf8(f"User-agent: *\nAllow: /\nSitemap: {frame.url('sitemap.xml')}\n"), "text/plain"
    )
    yield Page("404.html", "No such page", "missing", MISSING)
    yield Download(PICTURE, _picture(site), "image/png")


def _sitemap(pages: Sequence[Page], frame: Frame) -> bytes:
    from xml.sax.saxutils import escape

    lines = [
        f"<url><loc>{escape(frame.url(page.path))}</loc><lastmod>{frame.date}</lastmod></url>"
        for page in pages
    ]
    return utf8(
        '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
        + "\n".join(lines)
        + "\n</urlset>\n"
    )


def _picture(site: Site) -> bytes:
    """The scatter of the largest leaderboard, or the name alone, as links to the site show it."""
    tables = [(board.title, board.accuracies) for group in site.groups for board in boards(group)[:1]]
    drawn = [(title, t.scatter) for title, t in tables if t is not None and t.scatter is not None]
    title, scatter = max(drawn, key=lambda pair: len(pair[1].points), default=("", None))
    return _draw(title, scatter)


def _draw(title: str, scatter: Scatter | None) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.3), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"robbench: {title}" if title else "robbench", fontsize=26, parse_math=False)
    axes.set_xlabel("clean accuracy, %", fontsize=20)
    axes.set_ylabel("robust accuracy, %", fontsize=20)
    axes.tick_params(labelsize=16)
    for point in scatter.points if scatter else ():
        front = scatter is not None and point in scatter.front
        axes.plot(
            point.clean[0], point.robust[0], "o", markersize=13, color="#c04f00" if front else "#0072b2"
        )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
