"""Settings of `robbench train --set KEY=VALUE`, from text to values and back."""

from collections.abc import Mapping
from typing import Any

import yaml

from robbench.core.errors import UserError
from robbench.core.schema import parse_yaml


def parse_settings(pairs: list[str] | tuple[str, ...]) -> dict[str, str]:
    """("beta=5", ...) of `--set` as a dictionary; `UserError` for one without "=" or given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set {pair!r} is not KEY=VALUE; write for example --set beta=5")
        if key.strip() in found:
            raise UserError(f"--set {key.strip()} is given twice; give it once")
        found[key.strip()] = value
    return found


def group_settings(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`--set` entries by prefix: "recipe", "architecture" or "defense" (no prefix)."""
    groups: dict[str, dict[str, Any]] = {"recipe": {}, "architecture": {}, "defense": {}}
    for key, value in overrides.items():
        prefix, dot, rest = key.partition(".")
        group, name = (prefix, rest) if dot and prefix in groups else ("defense", key)
        groups[group][name] = read_value(key, value)
    return groups


def read_value(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    read = parse_yaml(value, f"--set {key}={value[:200]}")
    try:
        return float(read) if isinstance(read, str) else read  # YAML 1.1 reads 1e-3 as text
    except ValueError:
        return read


def yaml_value(value: Any) -> str:
    """A value as one line of YAML that `--set` reads back."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
