"""The fixtures that these tests share."""

from run_fixtures import damaged, originals, run

__all__ = ["damaged", "originals", "run"]
