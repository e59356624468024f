"""Typed YAML and JSON files: strict schemas, reading with one-line errors, canonical hashes.

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

from robbench.core.errors import UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Strict(BaseModel):
    """Base of all schemas: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Schema = TypeVar("Schema", bound=BaseModel)
DEEPEST = 64  # limit of nesting in a file, since functions on documents recurse
LARGEST = 64 << 20  # limit of bytes of a text file, since parsing takes far more memory and time
EXPANDED = 10_000  # limit of the values that aliases in a file stand for


def load_yaml(path: Path, schema: type[Schema]) -> Schema:
    """Read `path` as `schema`; `UserError` with file, key and reason when it is malformed, too large, too deep, or has
    aliases that stand for too many values."""
    return validate(read_yaml(path), schema, str(path))


def read_yaml(path: Path) -> object:
    """The plain values in a YAML file; `UserError` with the reason where it is not valid YAML."""
    return parse_yaml(_text(path), str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """The plain values in YAML text; `UserError` that names `origin` otherwise. All YAML is read here."""
    try:
        return yaml.load(text, Loader=_Careful)  # built on PyYAML's safe loader
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: is not valid YAML: {_one_line(error)}") from error
    except (ValueError, RecursionError) as error:  # an impossible date; brackets nested thousands deep
        raise UserError(f"{origin}: is not valid YAML for robbench: {_one_line(error)}") from error


def load_json(path: Path) -> Any:
    """The plain values in a JSON file; `ValueError` for invalid or too deep JSON, `OSError` as usual."""
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """The plain values in JSON text; `ValueError` for anything else, also for text nested deeper than `DEEPEST`."""
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested thousands of levels deep") from error
    level, depth = [content], 0
    while level := [part for value in level for part in _parts(value)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return content


def validate_json(text: str | bytes, schema: type[Schema], origin: str) -> Schema:
    """JSON text as `schema`; `UserError` naming origin and reason."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"{origin}: is not JSON ({_one_line(error)})") from error
    return validate(content, schema, origin)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _parts(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path}: has {size:,} bytes, at most {LARGEST:,} are read; check the path")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from error


def validate(content: object, schema: type[Schema], origin: str) -> Schema:
    """`content` as `schema`; `UserError` naming origin, key and reason."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = [_problem(problem, schema) for problem in error.errors()[:3]]
        more = f" (+{error.error_count() - 3} more)" if error.error_count() > 3 else ""
        raise UserError(f"{origin}: {'; '.join(problems)}{more}") from error


def _problem(problem: "ErrorDetails", schema: type[BaseModel]) -> str:
    """An error of pydantic as text for a person who edits the file."""
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


def _safe_loader() -> Any:
    """PyYAML's safe loader: with libyaml's scanner where PyYAML was built with it, which is ten times as fast. Nodes
    are composed in Python either way, so that `_Careful` sees each."""
    if not yaml.__with_libyaml__:
        return yaml.SafeLoader
    parser = yaml.cyaml.CParser  # type: ignore[attr-defined]
    parts = (yaml.composer.Composer, parser, yaml.constructor.SafeConstructor, yaml.resolver.Resolver)

    def start(self: Any, stream: str) -> None:
        parser.__init__(self, stream)
        for part in (parts[0], *parts[2:]):
            part.__init__(self)

    return type("SafeLoader", parts, {"__init__": start})


class _Careful(_safe_loader()):  # type: ignore[misc]
    """PyYAML's safe loader with further errors: a key given twice (of which PyYAML keeps the last), nesting beyond
    `DEEPEST`, and aliases that stand for more than `EXPANDED` values."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # number of values of a node, by its id
        self._expanded = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            node: yaml.Node = super().compose_node(parent, index)
            size = self._sizes.get(id(node))
            if size is None:  # its anchor is not complete yet
                raise yaml.composer.ComposerError(None, None, "an alias stands for what it is part of", mark)
            self._expanded += size
            if self._expanded > EXPANDED:
                problem = f"its aliases stand for more than {EXPANDED:,} values; write them out"
                raise yaml.composer.ComposerError(None, None, problem, mark)
            return node
        self._depth += 1
        if self._depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} levels deep", mark)
        composed: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(composed)] = 1 + sum(self._sizes[id(child)] for child in _children(composed))
        return composed

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
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def _children(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def dump_yaml(model: BaseModel) -> str:
    """A schema object as YAML text in its declared key order."""
    return yaml_text(model.model_dump(mode="json"))


class _Dumper(yaml.SafeDumper):
    """YAML that quotes strings with Unicode line breaks, which PyYAML would otherwise fold into spaces."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    breaks = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _represent_text)


def yaml_text(content: object) -> str:
    """Plain values as YAML text, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def canonical_hash(parts: object) -> str:
    """Hex sha256 of `parts` as canonical JSON (sorted keys, no spaces, floats as Python prints them)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
