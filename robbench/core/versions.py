"""Versions of installed packages. No torch here: `robbench doctor` may be asked about something else."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
