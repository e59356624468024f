"""Tests on every Python that is supported, style and types, and the documentation: `nox` (pip install nox).

A Python that the machine lacks is skipped. `nox -s tests-3.11 -- tests/publish` passes arguments on.
"""

import nox

PYTHONS = ["3.11", "3.12", "3.13"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "tests", "docs"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests, as `.ci/run` runs them."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS[0])
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "--strict", "robbench")


@nox.session(python=PYTHONS[0])
def docs(session: nox.Session) -> None:
    """What the documentation shows: the examples of docs/ci.md, and the site of the digits runs."""
    session.install("-e", ".[dev]")
    session.run("pytest", "tests/test_example_workflow.py")
    session.run("robbench", "report", "reports/runs/digits.zip", "--out", session.create_tmp())
