"""The record files of a run folder (run.yaml, cell.json, frechet/*.json): each ends with the sha256 of all else in it.

It finds whatever changed after robbench wrote the file: an edited budget, a flipped bit. Who also computes it anew is
found by `robbench verify`, which believes no hash. Records of schema 1 have none and are read as they are.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from robbench.core.errors import UserError
from robbench.core.schema import canonical_hash

RECORD_VERSION: Literal[2] = 2
WITHOUT_CHECKSUM = 1
CHECKSUM = "sha256"


class EditedRecordError(UserError):
    """A record file is not what robbench wrote."""


def with_checksum(record: BaseModel) -> dict[str, Any]:
    """What is written of a record: its fields, the schema version of today, and the checksum of both."""
    content = record.model_dump(mode="json") | {"schema_version": RECORD_VERSION}
    return {**content, CHECKSUM: canonical_hash(content)}


def without_checksum(path: Path, content: object, next_step: str, check: bool = True) -> object:
    """What was read from `path`, without its checksum. `EditedRecordError` when the rest does not have it; check:
    False only takes it out."""
    if not isinstance(content, dict) or content.get("schema_version", WITHOUT_CHECKSUM) == WITHOUT_CHECKSUM:
        return content
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    if check and content.get(CHECKSUM) != _hash(rest):
        raise EditedRecordError(
            f"{path}: was changed after robbench wrote it (its sha256 is not that of its content); {next_step}"
        )
    return rest


def _hash(content: dict[Any, Any]) -> str | None:
    """None for what JSON cannot hold, and so nothing that was written as a record."""
    try:
        return canonical_hash(content)
    except (TypeError, ValueError, RecursionError):
        return None
