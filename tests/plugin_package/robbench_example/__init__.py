"""A package outside robbench: one module a plug-in, announced by entry points in pyproject.toml."""
