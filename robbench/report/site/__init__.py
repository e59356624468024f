"""The static site: a leaderboard, and a page for each model, attack, threat model, published table and comparison."""

from robbench.report.site.build import write_single_file, write_site

__all__ = ["write_single_file", "write_site"]
