"""What all tests of bundles share."""

import functools
import pkgutil
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """The shipped cards and threat models are read from disk once, not for each of these bundles."""
    with pytest.MonkeyPatch.context() as patch:
        for place in (
            "bundle.subjects.zoo_entries",
            "bundle.verify.threat_models",
            "bundle.export.threat_models",
        ):
            function = pkgutil.resolve_name(f"robbench.{place}")
            patch.setattr(f"robbench.{place}", functools.cache(function))
        yield
