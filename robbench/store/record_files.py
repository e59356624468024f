"""The record files of a run folder (run.yaml, cell.json, frechet/*.json): each ends with the sha256 of its content.

The checksum reveals any change after robbench wrote the file, such as an edited budget or a flipped bit. A forged
checksum is found by `robbench verify`, which trusts no hash. Records of schema 1 have none and are read as they are.
"""

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from robbench.core.errors import UserError
from robbench.core.resources import write_text_atomically
from robbench.core.schema import canonical_hash, load_json, validate

RECORD_VERSION: Literal[2] = 2
WITHOUT_CHECKSUM = 1
CHECKSUM = "sha256"
Record = TypeVar("Record", bound=BaseModel)


class EditedRecordError(UserError):
    """A record file was changed after robbench wrote it."""


def with_checksum(record: BaseModel) -> dict[str, Any]:
    """The content of a record's file: its fields, the present schema version, and the checksum of both."""
    content = record.model_dump(mode="json") | {"schema_version": RECORD_VERSION}
    return {**content, CHECKSUM: canonical_hash(content)}


def without_checksum(path: Path, content: object, next_step: str, check: bool = True) -> object:
    """The content of a record's file without its checksum; with `check`, `EditedRecordError` where that is wrong."""
    if not isinstance(content, dict) or content.get("schema_version", WITHOUT_CHECKSUM) == WITHOUT_CHECKSUM:
        return content
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    if check and content.get(CHECKSUM) != _hash(rest):
        raise EditedRecordError(
            f"{path}: was changed after robbench wrote it (its sha256 is not that of its content); {next_step}"
        )
    return rest


def write_json_record(path: Path, record: BaseModel) -> None:
    """Store `record` at `path` with its checksum, atomically."""
    write_text_atomically(path, json.dumps(with_checksum(record), indent=2, ensure_ascii=False) + "\n")


def read_json_record(path: Path, schema: type[Record], next_step: str, check: bool = True) -> Record:
    """The record that `write_json_record` stored at `path`; `UserError` that ends with `next_step` when it is
    malformed, or (with `check`) changed after robbench wrote it."""
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not JSON ({error}); {next_step}") from error
    try:
        return validate(without_checksum(path, content, next_step, check), schema, str(path))
    except EditedRecordError:
        raise
    except UserError as error:
        raise UserError(f"{error}; {next_step}") from error


def _hash(content: dict[Any, Any]) -> str | None:
    """Hash of a record's content; None for values that JSON cannot represent."""
    try:
        return canonical_hash(content)
    except (TypeError, ValueError, RecursionError):
        return None
