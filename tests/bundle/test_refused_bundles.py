"""Every bundle that is no bundle is refused with its own reason, and leaves nothing behind."""

import io
import json
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written_runs import contents, edited, rehashed, set_manifest, write_run

from robbench.bundle.archive import open_bundle
from robbench.bundle.examples import ExampleChoice
from robbench.bundle.export import ExportRequest, export_run
from robbench.bundle.zipcheck import Limits
from robbench.core.errors import UserError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good bundle of two models and two attacks. Read only."""
    folder = tmp_path_factory.mktemp("good")
    write_run(folder / "run")
    export_run(ExportRequest(folder / "run", folder / "good.zip", ExampleChoice.parse("all")))
    return folder / "good.zip"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go; empty again after every test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def refusal(path: Path, temporary: Path, limits: Limits | None = None) -> str:
    with pytest.raises(UserError) as caught, open_bundle(path, limits):
        pass
    text = str(caught.value)
    assert "\n" not in text
    assert str(temporary) not in text
    assert list(temporary.iterdir()) == []
    return text


def shard_of(files: dict[str, bytes], number: int = 0) -> str:
    return [name for name in sorted(files) if name.endswith(".parquet")][number]


def test_a_good_bundle_opens_and_its_folder_goes(bundle: Path, temporary: Path) -> None:
    with open_bundle(bundle) as opened:
        assert opened.folder.is_dir()
        assert [len(result.rows) for result in opened.run.cells] == [5, 5, 5, 5]
    assert list(temporary.iterdir()) == []


def test_the_folder_goes_when_the_reader_fails(bundle: Path, temporary: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_bundle(bundle):
        raise ZeroDivisionError
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06" + b"\0" * 10])
def test_no_zip(tmp_path: Path, temporary: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    assert "not a zip file" in refusal(tmp_path / "x.zip", temporary)


def test_no_file(tmp_path: Path, temporary: Path) -> None:
    assert "is no file" in refusal(tmp_path / "absent.zip", temporary)
    assert "is no file" in refusal(tmp_path, temporary)


def test_any_zip_is_no_bundle(tmp_path: Path, temporary: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("run.yaml", "a: 1")
    assert "has no manifest.json" in refusal(tmp_path / "x.zip", temporary)


def test_cut_short(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    content = bundle.read_bytes()
    for length in (10, len(content) // 2, len(content) - 1):
        (tmp_path / "x.zip").write_bytes(content[:length])
        assert "is refused" in refusal(tmp_path / "x.zip", temporary)


NAMES = [
    ("/etc/passwd", "absolute path"),
    ("C:/x.json", "absolute path"),
    ("../run.yaml", "climbs out"),
    ("cells/../../run.yaml", "climbs out"),
    ("cells\\x.json", "backslash"),
    ("..\\x.json", "backslash"),
    ("cells/a\nb.json", "control characters"),
    ("cells/a\x00b.json", "control characters"),
    ("cells//x.json", "empty or '.' part"),
    ("./run2.yaml", "empty or '.' part"),
    ("cells/", "is a folder"),
    ("a/b/c/d/e.json", "nested too deep"),
    ("weights.safetensors", "looks like weights"),
    ("cards/model.PT", "looks like weights"),
    ("inner.zip", "archive inside the archive"),
    ("cells/x.tar.gz", "archive inside the archive"),
    ("RUN.yaml", "differ in case only"),
    ("readme.txt", "not listed in manifest.json"),
]


@pytest.mark.parametrize(("name", "reason"), NAMES)
def test_names(bundle: Path, tmp_path: Path, temporary: Path, name: str, reason: str) -> None:
    """Written as bytes: zipfile would mend some of these names on the way."""
    placeholder = "x" * len(name)
    edited(bundle, tmp_path / "x.zip", lambda files: files.update({placeholder: b"{}"}))
    content = (tmp_path / "x.zip").read_bytes()
    assert content.count(placeholder.encode()) == 2
    (tmp_path / "x.zip").write_bytes(content.replace(placeholder.encode(), name.encode()))
    assert reason in refusal(tmp_path / "x.zip", temporary)


def test_a_listed_file_without_a_place(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    path = edited(bundle, tmp_path / "x.zip", lambda files: files.update({"notes.txt": b"hi"}), rehash=True)
    assert "'notes.txt' has no place in a bundle" in refusal(path, temporary)


def test_the_same_name_twice(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    path = edited(bundle, tmp_path / "x.zip", lambda files: None)
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(path, "a") as archive,
    ):
        archive.writestr("run.yaml", "other: content")
    assert "'run.yaml' is there twice" in refusal(path, temporary)


@pytest.mark.parametrize(("mode", "reason"), [(0o120777, "is a link"), (0o010644, "no plain file")])
def test_links_and_devices(bundle: Path, tmp_path: Path, temporary: Path, mode: int, reason: str) -> None:
    path = edited(bundle, tmp_path / "x.zip", lambda files: None)
    info = zipfile.ZipInfo("cards/link.yaml")
    info.create_system, info.external_attr = 3, mode << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    assert reason in refusal(path, temporary)


def patched(path: Path, name: str, offset: int, value: bytes) -> Path:
    """The central directory's entry of `name` with the bytes at `offset` of its header replaced."""
    content = bytearray(path.read_bytes())
    place = content.rindex(name.encode()) - 46
    assert content[place : place + 4] == b"PK\x01\x02"
    content[place + offset : place + offset + len(value)] = value
    path.write_bytes(bytes(content))
    return path


def test_encrypted(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    path = edited(bundle, tmp_path / "x.zip", lambda files: None)
    assert "'run.yaml' is encrypted" in refusal(patched(path, "run.yaml", 8, struct.pack("<H", 1)), temporary)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 99])
def test_other_methods(bundle: Path, tmp_path: Path, temporary: Path, method: int) -> None:
    path = patched(
        edited(bundle, tmp_path / "x.zip", lambda f: None), "run.yaml", 10, struct.pack("<H", method)
    )
    assert f"packed by method {method}" in refusal(path, temporary)


def test_a_bomb_that_declares_itself(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    path = edited(bundle, tmp_path / "x.zip", lambda f: f.update({"cards/z.yaml": b"\0" * (8 << 20)}), True)
    assert "zip bomb: file 'cards/z.yaml' grows" in refusal(path, temporary)


def test_a_bomb_of_many_files(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    """Each below the slack, together beyond the ratio."""
    small = {f"cards/z{i}.yaml": b"\0" * (1 << 20) for i in range(12)}
    path = edited(bundle, tmp_path / "x.zip", lambda files: files.update(small), rehash=True)
    assert "zip bomb" in refusal(path, temporary)
    many = {f"cards/z{i}.yaml": b"" for i in range(40)}
    path = edited(bundle, tmp_path / "y.zip", lambda files: files.update(many))
    assert "zip bomb: 55 files" in refusal(path, temporary, Limits(files=50))


def test_a_bomb_that_lies(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    """The header declares 100 bytes, the stream holds 64 MB; what is read stops at what was declared."""
    path = edited(bundle, tmp_path / "x.zip", lambda f: f.update({"cards/z.yaml": b"\0" * (64 << 20)}))
    files = contents(path)
    files["cards/z.yaml"] = b"\0" * 100
    rehashed(files)
    with zipfile.ZipFile(tmp_path / "y.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, b"\0" * (64 << 20) if name == "cards/z.yaml" else content)
    lying = patched(tmp_path / "y.zip", "cards/z.yaml", 24, struct.pack("<I", 100))
    text = refusal(lying, temporary)
    assert "'cards/z.yaml'" in text
    assert "declared" in text or "cannot be unpacked" in text or "not what manifest.json hashed" in text


def test_entries_that_share_bytes(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    path = edited(bundle, tmp_path / "x.zip", lambda files: None)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    offset = entries["run.yaml"].header_offset + 4
    shared = patched(path, "originals.npz", 42, struct.pack("<I", offset))
    assert "share bytes" in refusal(shared, temporary)


def changed(content: bytes, place: int, change: bytes, removed: int) -> bytes:
    """`content` with `removed` bytes at `place` (taken around) replaced by `change`."""
    place %= len(content)
    return content[:place] + change + content[place + removed :]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4), st.integers(0, 4), st.integers(-1, 30))
def test_anything_damaged_is_refused_in_one_line_or_read(
    bundle: Path, tmp_path: Path, temporary: Path, place: int, change: bytes, removed: int, number: int
) -> None:
    """Bytes of the zip file itself, or (number >= 0) of one of its files with the hashes made to fit."""

    def damage(files: dict[str, bytes]) -> None:
        name = sorted(files)[number % len(files)]
        files[name] = changed(files[name], place, change, removed)

    path = tmp_path / "x.zip"
    if number < 0:
        path.write_bytes(changed(bundle.read_bytes(), place, change, removed))
    else:
        edited(
            bundle,
            path,
            damage,
            rehash=sorted(contents(bundle))[number % len(contents(bundle))] != "manifest.json",
        )
    reason = ""
    try:
        with open_bundle(path) as opened:
            assert [len(result.rows) for result in opened.run.cells] == [5, 5, 5, 5]
    except UserError as error:
        reason = str(error)
    assert "\n" not in reason
    assert list(temporary.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ contents
def test_a_missing_shard_names_cell_and_file(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    name = shard_of(contents(bundle))
    text = refusal(edited(bundle, tmp_path / "x.zip", lambda files: files.pop(name)), temporary)
    assert f"file '{name}' of cell alpha x pgd20 is missing" in text
    hidden = edited(bundle, tmp_path / "y.zip", lambda files: files.pop(name), rehash=True)
    assert "the shard of cell alpha x pgd20 is missing" in refusal(hidden, temporary)


@pytest.mark.parametrize("name", ["run.yaml", "cards/alpha.yaml", "cells/0000000000000001/cell.json"])
def test_a_missing_file(bundle: Path, tmp_path: Path, temporary: Path, name: str) -> None:
    listed = edited(bundle, tmp_path / "x.zip", lambda files: files.pop(name))
    assert f"'{name}'" in refusal(listed, temporary)
    hidden = edited(bundle, tmp_path / "y.zip", lambda files: files.pop(name), rehash=True)
    assert name.rsplit("/", 1)[-1] in refusal(hidden, temporary)


def test_another_byte(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    name = shard_of(contents(bundle), 1)

    def flip(files: dict[str, bytes]) -> None:
        files[name] = files[name][:-9] + bytes([files[name][-9] ^ 1]) + files[name][-8:]

    text = refusal(edited(bundle, tmp_path / "x.zip", flip), temporary)
    assert f"file '{name}' of cell alpha x jsa50 is not what manifest.json hashed" in text


def test_another_size(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    name = "cards/beta.yaml"

    def grow(files: dict[str, bytes]) -> None:
        files[name] += b"\n"

    assert "bytes, manifest.json says" in refusal(edited(bundle, tmp_path / "x.zip", grow), temporary)


def test_rows_changed_with_all_hashes(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    """A verdict edited by a Parquet tool and hashed again fails at the digest of the rows."""
    name = shard_of(contents(bundle))

    def lie(files: dict[str, bytes]) -> None:
        table = pq.read_table(io.BytesIO(files[name]))
        place = table.schema.get_field_index("robust")
        flipped = pa.array([not value for value in table["robust"].to_pylist()])
        sink = io.BytesIO()
        pq.write_table(table.set_column(place, table.schema.field(place), flipped), sink)
        files[name] = sink.getvalue()

    text = refusal(edited(bundle, tmp_path / "x.zip", lie, rehash=True), temporary)
    assert f"{name} holds other rows than were written" in text


def test_a_newer_manifest(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    newer = {"schema_version": 7, "versions": {"robbench": "9.1.0"}, "surprise": 1}
    path = edited(bundle, tmp_path / "x.zip", lambda files: set_manifest(files, **newer))
    text = refusal(path, temporary)
    assert "written by a newer robbench (bundle schema 7); robbench >= 9.1.0 can read it" in text


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000, b"{}", b"\xff", b"null"])
def test_a_broken_manifest(bundle: Path, tmp_path: Path, temporary: Path, content: bytes) -> None:
    path = edited(bundle, tmp_path / "x.zip", lambda files: files.update({"manifest.json": content}))
    assert "manifest.json" in refusal(path, temporary)


def test_a_manifest_of_another_run(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    def reseed(files: dict[str, bytes]) -> None:
        run = yaml.safe_load(files["run.yaml"])
        files["run.yaml"] = yaml.safe_dump(run | {"seed": 5}).encode()

    path = edited(bundle, tmp_path / "x.zip", reseed, rehash=True)
    assert "run.yaml is of another run" in refusal(path, temporary)


def test_foreign_weights(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    models = {"alpha": "e" * 64, "beta": "c" * 64}
    path = edited(bundle, tmp_path / "x.zip", lambda files: set_manifest(files, models=models))
    assert "cell alpha x pgd20 was measured on weights cccccccccccc" in refusal(path, temporary)

    def swap(files: dict[str, bytes]) -> None:
        name = "cards/beta.yaml"
        files[name] = files[name].replace(b"c" * 64, b"e" * 64)

    swapped = edited(bundle, tmp_path / "y.zip", swap, rehash=True)
    assert "beta with weights eeeeeeeeeeee" in refusal(swapped, temporary)


def test_a_foreign_flow(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    flows = {"digits-glow": "a" * 64}
    path = edited(bundle, tmp_path / "x.zip", lambda files: set_manifest(files, flows=flows))
    assert "used flow digits-glow with weights ffffffffffff" in refusal(path, temporary)


def test_aliases_that_would_fill_the_memory(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    def laugh(files: dict[str, bytes]) -> None:
        lines = ["  a0: &a0 [x, x]", *(f"  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
        card = files["cards/beta.yaml"].decode()
        assert "arguments: {}" in card
        files["cards/beta.yaml"] = card.replace(
            "  arguments: {}", "  arguments:\n  " + "\n  ".join(lines)
        ).encode()

    text = refusal(edited(bundle, tmp_path / "x.zip", laugh, rehash=True), temporary)
    assert "'cards/beta.yaml' holds YAML aliases" in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"exported": 11}, "12 values of example, manifest.json says 11"),
        ({"witnesses": 7}, "6 values of witness, manifest.json says 7"),
    ],
)
def test_totals(bundle: Path, tmp_path: Path, temporary: Path, change: dict[str, int], reason: str) -> None:
    examples = json.loads(contents(bundle)["manifest.json"])["examples"] | change
    path = edited(bundle, tmp_path / "x.zip", lambda files: set_manifest(files, examples=examples))
    assert reason in refusal(path, temporary)


def test_a_partial_bundle_that_calls_itself_complete(tmp_path: Path, temporary: Path) -> None:
    write_run(tmp_path / "run")
    sorted((tmp_path / "run").glob("cells/*/shard-*"))[0].unlink()
    export_run(ExportRequest(tmp_path / "run", tmp_path / "p.zip", ExampleChoice.parse("all"), partial=True))
    path = edited(tmp_path / "p.zip", tmp_path / "x.zip", lambda files: set_manifest(files, partial=False))
    assert "cell alpha x pgd20 is 'running', and manifest.json calls it complete" in refusal(path, temporary)


@pytest.mark.parametrize(("key", "value"), [("rows", 4), ("examples", 9), ("status", "failed")])
def test_counts_of_a_cell(bundle: Path, tmp_path: Path, temporary: Path, key: str, value: object) -> None:
    cells = json.loads(contents(bundle)["manifest.json"])["cells"]
    cells[2][key] = value
    path = edited(bundle, tmp_path / "x.zip", lambda files: set_manifest(files, cells=cells))
    assert f"cell beta x pgd20 has {key}" in refusal(path, temporary)


def test_a_cell_that_no_plan_has(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    extra = "cells/00000000000000ff/cell.json"
    path = edited(bundle, tmp_path / "x.zip", lambda files: files.update({extra: b"{}"}), rehash=True)
    assert "belongs to nothing in the plan" in refusal(path, temporary)


def test_a_shard_that_would_fill_the_memory(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    name = shard_of(contents(bundle))

    def grow(files: dict[str, bytes]) -> None:
        sink = io.BytesIO()
        pq.write_table(pa.table({"sample_id": np.zeros(3_000_000, np.int64)}), sink, compression="zstd")
        files[name] = sink.getvalue()

    text = refusal(edited(bundle, tmp_path / "x.zip", grow, rehash=True), temporary)
    assert "declares 3,000,000 rows" in text
    assert "alpha x pgd20" in text


def test_words_that_would_fill_the_memory(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    """One long value that every row names is small in the file and large in memory."""
    name = shard_of(contents(bundle))

    def grow(files: dict[str, bytes]) -> None:
        table = pq.read_table(io.BytesIO(files[name]))
        words = pa.array(["x" * (8 << 20)] * len(table))
        sink, place = io.BytesIO(), table.schema.get_field_index("broken_by")
        pq.write_table(table.set_column(place, "broken_by", words), sink, compression="zstd")
        files[name] = sink.getvalue()

    text = refusal(edited(bundle, tmp_path / "x.zip", grow, rehash=True), temporary)
    assert "declares 5 rows and 41,943," in text


def test_a_cell_that_is_planned_twice(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    """The average would count it twice."""

    def double(files: dict[str, bytes]) -> None:
        run, manifest = yaml.safe_load(files["run.yaml"]), json.loads(files["manifest.json"])
        for document in (run, manifest):
            document["cells"].append(dict(document["cells"][0]))
        files["run.yaml"] = yaml.safe_dump(run, sort_keys=False).encode()
        files["manifest.json"] = json.dumps(manifest).encode()

    text = refusal(edited(bundle, tmp_path / "x.zip", double, rehash=True), temporary)
    assert "plans cell alpha x pgd20 twice" in text


@pytest.mark.parametrize("bad", ["\x1b[2Jagrees", "a\rb", "\u202eabc"])
def test_what_a_terminal_would_obey(bundle: Path, tmp_path: Path, temporary: Path, bad: str) -> None:
    def say(files: dict[str, bytes]) -> None:
        name = "cells/0000000000000001/cell.json"
        files[name] = json.dumps(json.loads(files[name]) | {"engine": bad}).encode()

    text = refusal(edited(bundle, tmp_path / "x.zip", say, rehash=True), temporary)
    assert "'cells/0000000000000001/cell.json' holds the control character" in text
    assert bad not in text


def test_a_seed_that_is_none(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    run = json.loads(contents(bundle)["manifest.json"])["run"] | {"seed": -1}
    path = edited(bundle, tmp_path / "x.zip", lambda files: set_manifest(files, run=run))
    assert "seed" in refusal(path, temporary)


@pytest.mark.parametrize("name", ["..zip", "...zip", "é ✓;$x.zip", "n" * 251 + ".zip"])
def test_names_of_the_bundle_itself(bundle: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bundle.read_bytes())
    with open_bundle(tmp_path / name) as opened:
        assert opened.folder.parent.name.startswith("robbench-bundle-")


def test_originals_that_would_fill_the_memory(bundle: Path, tmp_path: Path, temporary: Path) -> None:
    def npz(**arrays: np.ndarray) -> bytes:
        sink = io.BytesIO()
        np.savez_compressed(sink, **arrays)  # type: ignore[arg-type]
        return sink.getvalue()

    ids = np.arange(3)
    bomb = npz(ids=ids, images=np.zeros((1, 1, 1000, 1000), np.float32))
    path = edited(bundle, tmp_path / "x.zip", lambda f: f.update({"originals.npz": bomb}), rehash=True)
    assert "zip bomb: originals.npz" in refusal(path, temporary)
    strange = npz(ids=ids, images=np.zeros((3, 1, 2, 2), np.float32), code=ids)
    path = edited(bundle, tmp_path / "y.zip", lambda f: f.update({"originals.npz": strange}), rehash=True)
    assert "other arrays than ids and images" in refusal(path, temporary)
    wide = npz(ids=ids, images=np.zeros((3, 1, 1, 4), np.float32))
    path = edited(bundle, tmp_path / "z.zip", lambda f: f.update({"originals.npz": wide}), rehash=True)
    assert "images of another shape" in refusal(path, temporary)
