"""What a text or a header declares is no reason to take memory, time or a traceback: YAML, JSON, npz and numbers."""

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from robbench.core.errors import UserError
from robbench.core.npz import npz_names, read_npz
from robbench.core.numerals import number, whole_number
from robbench.core.resources import data_root
from robbench.core.schema import DEEPEST, parse_json, parse_yaml, validate_json
from robbench.specs import ThreatModel

LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)
MERGES = "\n".join(
    ["a0: &a0 {k: v, l: v}"]
    + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)]
)


# -------------------------------------------------------------------------------------------------------------- YAML
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "aliases stand for more than"),
        (MERGES, "aliases stand for more than"),
        ("a: &a [*a]", "part of"),
        ("a: &a {b: {c: *a}}", "part of"),
        ("a: " + "[" * 500 + "]" * 500, "levels deep"),
        ("a: " + "{b: " * 500 + "1" + "}" * 500, "levels deep"),
        ("[" * 100_000, "not valid YAML"),
        ("a: 1\na: 2", "given twice"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 2001-99-99", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_yaml_that_is_larger_than_its_text_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        parse_yaml(text, "card.yaml")
    assert str(caught.value).startswith("card.yaml: ")
    assert "\n" not in str(caught.value)


def test_shipped_files_are_read_as_pyyaml_reads_them() -> None:
    """libyaml's scanner and composition in Python, against the loader that is Python alone."""
    for path in sorted((data_root() / "threat_models").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert parse_yaml(text, str(path)) == yaml.safe_load(text)


def test_a_few_aliases_are_fine() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: *x", "f") == {"a": [1, 2], "b": [1, 2], "c": [1, 2]}
    assert parse_yaml("a: &x {k: 1}\nb: {<<: *x, l: 2}", "f")["b"] == {"k": 1, "l": 2}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
        max_leaves=20,
    )
)
@settings(max_examples=50)
def test_everything_json_writes_is_read_back(value: object) -> None:
    """JSON is a reader's oracle here: depth and counts stay far below the limits."""
    assert parse_json(json.dumps(value)) == value


# -------------------------------------------------------------------------------------------------------------- JSON
@pytest.mark.parametrize("depth", [DEEPEST + 2, 500, 100_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_json_that_is_too_deep(depth: int, brackets: str) -> None:
    opening = "[" if brackets == "[]" else '{"a":'
    with pytest.raises(ValueError, match="levels deep"):
        parse_json(opening * depth + "1" + brackets[1] * depth)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "{", "\ufeff1", b"\xff\xfe", "1" * 5000])
def test_what_is_no_json(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (each for its own reason)
        parse_json(text)
    with pytest.raises(UserError, match=r"^here: is not JSON"):
        validate_json(text, ThreatModel, "here")


# --------------------------------------------------------------------------------------------------------------- npz
def npy(
    shape: str, dtype: str = "<f4", data: bytes = b"", version: int = 1, length: int | None = None
) -> bytes:
    """An npy file whose header says what it likes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(header) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def written(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy("(1000000, 1000000, 1000)"), "declares shape"),
        (npy("(2, 2)", data=bytes(12)), "declares shape"),
        (npy("(2, 2)", data=bytes(20)), "declares shape"),
        (npy("(-2, -2)", data=bytes(16)), ""),
        (npy("(" + "9" * 400 + ",)"), ""),
        (npy("(" * 300 + ")" * 300), ""),
        (npy("(2,)", dtype="|S1000000000"), "declares shape"),
        (npy("(1,)", version=2, length=4_000_000_000), "an npy header of 4,000,000,000 bytes"),
        (npy("(1,)", dtype="|O", data=b"\x80\x04N."), "allow_pickle"),
        (b"\x93NUMPY", ""),
        (b"", ""),
    ],
)
def test_npz_headers_are_held_to_the_file(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason or "."):
        read_npz(written(tmp_path / "a.npz", x=content), ["x"])


def flagged(path: Path, offset_local: int, offset_central: int, value: bytes) -> None:
    """Overwrite bytes of the first local header and of the first central one."""
    content = bytearray(path.read_bytes())
    for start, offset in ((content.find(b"PK\3\4"), offset_local), (content.find(b"PK\1\2"), offset_central)):
        content[start + offset : start + offset + len(value)] = value
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("local", "central", "value"),
    [
        (6, 8, b"\x01\x00"),  # encrypted
        (6, 8, b"\x41\x00"),  # strongly encrypted
        (8, 10, b"\x63\x00"),  # packed by a method nobody knows
        (22, 24, b"\xf0\xff\xff\xff"),  # unpacks to 4 GB
        (26, 28, b"\xff\xff"),  # a name of 64 kB
    ],
)
def test_damaged_zip_headers(local: int, central: int, value: bytes, tmp_path: Path) -> None:
    good = io.BytesIO()
    np.save(good, np.arange(4.0))
    path = written(tmp_path / "a.npz", x=good.getvalue())
    assert read_npz(path, ["x"])["x"].tolist() == [0, 1, 2, 3]
    assert npz_names(path) == ["x"]
    flagged(path, local, central, value)
    with pytest.raises(ValueError):  # noqa: PT011
        read_npz(path, ["x"])


@given(place=st.integers(0, 400), value=st.integers(0, 255))
@settings(max_examples=150)
def test_any_byte_of_an_npz_may_be_another(
    place: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    np.savez_compressed(path, x=np.arange(6.0), y=np.arange(3))
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(bytes(content))
    try:
        found = read_npz(path, ["x", "y"])
    except ValueError:
        return
    assert found["x"].tolist() == list(range(6))  # whatever is read has passed its checksum
    assert found["y"].tolist() == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    ("text", "value"),
    [("0.1", 0.1), ("8/255", 8 / 255), (" 3e-2 ", 0.03), ("-1", -1.0), (".5", 0.5), ("+2.", 2.0)],
)
def test_numbers(text: str, value: float) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "1e999999999",
        "9" * 5000,
        "1/0",
        "1/1e999999999",
        "1_0",
        "0x10",
        "\u0661",
        "1//2",
    ],
)
def test_no_numbers(text: str) -> None:
    assert number(text) is None


@given(st.floats(-1e30, 1e30, allow_subnormal=False))
def test_what_python_prints_is_read_back(value: float) -> None:
    assert number(repr(value)) == value


@given(st.text(max_size=40))
def test_any_text_is_a_finite_number_or_none(text: str) -> None:
    value = number(text)
    assert value is None or abs(value) < float("inf")


@pytest.mark.parametrize("text", ["-1", "1.5", "", "9" * 19, "9" * 5000, "\u0663", "1e3", "+1"])
def test_no_whole_numbers(text: str) -> None:
    assert whole_number(text) is None


def test_whole_numbers() -> None:
    assert whole_number("0") == 0
    assert whole_number("9" * 18) == 10**18 - 1
