"""The fixtures that these tests share."""

from run_fixtures import damaged, originals, run
from site_pages import chromium, few_tables, site

__all__ = ["chromium", "damaged", "few_tables", "originals", "run", "site"]
