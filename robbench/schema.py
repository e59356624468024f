"""What typed YAML files rest on: strict schemas, reading with errors in one line, canonical hashes.

No torch here: listing attacks and models stays fast.
"""

import difflib
import hashlib
import json
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from robbench.errors import UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Strict(BaseModel):
    """Base of all schemas: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Schema = TypeVar("Schema", bound=BaseModel)


def load_yaml(path: Path, schema: type[Schema]) -> Schema:
    """Read `path` as `schema`; `UserError` with file, key and reason when it is malformed."""
    return validate(read_yaml(path), schema, str(path))


def read_yaml(path: Path) -> object:
    """What the YAML file `path` holds; `UserError` with the reason when it is no YAML."""
    try:
        # The loader is PyYAML's safe one.
        content: object = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {_one_line(error)}") from error
    except (ValueError, RecursionError) as error:  # an impossible date; brackets nested thousands deep
        raise UserError(f"{path}: is not valid YAML for robbench: {_one_line(error)}") from error
    return content


def validate(content: object, schema: type[Schema], origin: str) -> Schema:
    """`content` as `schema`; `UserError` naming origin, key and reason."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = [_problem(problem, schema) for problem in error.errors()[:3]]
        more = f" (+{error.error_count() - 3} more)" if error.error_count() > 3 else ""
        raise UserError(f"{origin}: {'; '.join(problems)}{more}") from error


def _problem(problem: "ErrorDetails", schema: type[BaseModel]) -> str:
    """One finding of pydantic in the words of somebody who edits the file."""
    place = [str(part) for part in problem["loc"]]
    key = f"key {'.'.join(place)}" if place else "the whole"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], schema.model_fields, n=1) if len(place) == 1 else []
        return f"{key}: is not known" + (f"; did you mean {near[0]!r}?" if near else "; remove it")
    if problem["type"] == "missing":
        return f"{key}: is missing"
    if problem["type"] == "model_type":
        found = "is empty" if problem["input"] is None else f"is a {type(problem['input']).__name__}"
        return f"{key}: {found}, not keys with values"
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}"


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, but a key given twice is an error; alone it would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def dump_yaml(model: BaseModel) -> str:
    """A schema object as YAML text in its declared key order."""
    return yaml_text(model.model_dump(mode="json"))


def yaml_text(content: object) -> str:
    """Plain values as YAML text, keys in the order they have."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def canonical_hash(parts: object) -> str:
    """Hex sha256 of `parts` as canonical JSON (sorted keys, no spaces, floats as Python prints them)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
