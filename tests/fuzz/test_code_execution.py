"""No file that others send runs code: 73 attempts, each of which would leave a canary behind."""

import builtins
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fuzzing import command, copied
from test_mutated_yaml import data_folder

from robbench.core.resources import data_root, sha256_file

CANARY = "canary"


class Payload:
    """Pickles to a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self._call


def payloads(canary: Path) -> dict[str, object]:
    """Objects whose unpickling would make `canary`."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    return {
        "system": Payload(os.system, touch),
        "popen": Payload(subprocess.getoutput, touch),
        "exec": Payload(builtins.exec, code),
        "eval": Payload(builtins.eval, f"__import__('os').system({touch!r})"),
        "open": Payload(builtins.open, str(canary), "w"),
        "torch": Payload(torch.save, {}, str(canary)),
    }


PAYLOADS = ("system", "popen", "exec", "eval", "open", "torch")


@dataclass(frozen=True)
class Attempt:
    """place: where the file and the canary go. run: the run of the fuzzers."""

    place: Path
    run: Path

    @property
    def canary(self) -> Path:
        return self.place / CANARY

    def payload(self, name: str) -> object:
        return payloads(self.canary)[name]


# ------------------------------------------------------------------------------------------------------- pickles
def card_with(attempt: Attempt, file: str, **weights: object) -> Path:
    """A folder with a card for a weights file beside it."""
    card = yaml.safe_load((data_root() / "zoo" / "digits-at" / "card.yaml").read_text(encoding="utf-8"))
    card |= {"name": "foreign", "golden": None, "training": None, "measurements": []}
    card["weights"] = {"file": file, "sha256": sha256_file(attempt.place / "model" / file), **weights}
    (attempt.place / "model" / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    return attempt.place / "model"


def used(folder: Path) -> None:
    """A model of somebody else, named by the user."""
    result = command(
        "run", "--model", folder / "card.yaml", "--attacks", "fgsm", "--n", 4, "--out", folder.parent / "r"
    )
    assert result.exit_code in (2, 3), result.output


def weights_of_torch_save(attempt: Attempt, name: str) -> None:
    (attempt.place / "model").mkdir()
    torch.save({"state": attempt.payload(name)}, attempt.place / "model" / "w.pt")
    used(card_with(attempt, "w.pt", format="state-dict"))


def weights_of_old_torch_save(attempt: Attempt, name: str) -> None:
    (attempt.place / "model").mkdir()
    path = attempt.place / "model" / "w.pt"
    torch.save({"state": attempt.payload(name)}, path, _use_new_zipfile_serialization=False)
    used(card_with(attempt, "w.pt", format="state-dict"))


def weights_that_are_a_pickle(attempt: Attempt, name: str) -> None:
    (attempt.place / "model").mkdir()
    (attempt.place / "model" / "w.safetensors").write_bytes(pickle.dumps(attempt.payload(name)))
    used(card_with(attempt, "w.safetensors"))


def arrays_of_objects(attempt: Attempt, name: str) -> None:
    folder = data_folder(attempt.place / "data")
    objects = np.array([attempt.payload(name)], dtype=object)
    np.savez(folder / "test.npz", x=objects, y=np.zeros(1, dtype=np.int64), allow_pickle=True)
    card = yaml.safe_load((folder / "card.yaml").read_text(encoding="utf-8"))
    card["splits"]["test"]["sha256"] = sha256_file(folder / "test.npz")
    (folder / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    result = command(
        "run", "--data", folder, "--model", "digits-at", "--attacks", "fgsm", "--out", attempt.place / "r"
    )
    assert result.exit_code == 2, result.output


def originals_of_objects(attempt: Attempt, name: str) -> None:
    """The clean images in a run folder, which every report reads."""
    folder = copied(attempt.run, attempt.place / "run")
    objects = np.array([attempt.payload(name)], dtype=object)
    np.savez(folder / "originals.npz", ids=np.zeros(1, dtype=np.int64), images=objects, allow_pickle=True)
    assert command("report", folder).exit_code in (0, 2)


def training_checkpoint(attempt: Attempt, name: str) -> None:
    """A training that somebody else began."""
    arguments = ("train", "--defense", "standard", "--dataset", "digits", "--name", "t", "--epochs", 1)
    out = attempt.place / "zoo"
    out.mkdir()
    content = {"identity": {}, "schema_version": 1, "model": attempt.payload(name)}
    torch.save(content, out / "t.checkpoint.pt")
    assert command(*arguments, "--out", out).exit_code == 2


PICKLES = (
    weights_of_torch_save,
    weights_of_old_torch_save,
    weights_that_are_a_pickle,
    arrays_of_objects,
    originals_of_objects,
    training_checkpoint,
)

# ---------------------------------------------------------------------------------------------------------- YAML
TAGS = {
    "apply": "!!python/object/apply:os.system ['touch {canary}']",
    "new": "!!python/object/new:os.system ['touch {canary}']",
    "name": "!!python/name:os.system",
    "module": "!!python/module:canary_module",
    "object": "!!python/object:subprocess.Popen {{args: ['touch', '{canary}']}}",
}


def tag(attempt: Attempt, name: str) -> str:
    return f"\nnote: {TAGS[name].format(canary=attempt.canary)}\n"


def yaml_card(attempt: Attempt, name: str) -> None:
    folder = attempt.place / "zoo" / "foreign"
    folder.mkdir(parents=True)
    text = (data_root() / "zoo" / "digits-at" / "card.yaml").read_text(encoding="utf-8")
    (folder / "card.yaml").write_text(text + tag(attempt, name), encoding="utf-8")
    assert command("list", "models", "--zoo", folder.parent).exit_code == 2


def yaml_threat_model(attempt: Attempt, name: str) -> None:
    text = (data_root() / "threat_models" / "l2.yaml").read_text(encoding="utf-8")
    (attempt.place / "own.yaml").write_text(text + tag(attempt, name), encoding="utf-8")
    assert command("list", "attacks", "--threat-models", attempt.place).exit_code == 2


def yaml_data_card(attempt: Attempt, name: str) -> None:
    folder = data_folder(attempt.place / "data")
    with (folder / "card.yaml").open("a", encoding="utf-8") as stream:
        stream.write(tag(attempt, name))
    assert command("show", folder).exit_code == 2


def yaml_run(attempt: Attempt, name: str) -> None:
    folder = copied(attempt.run, attempt.place / "run")
    with (folder / "run.yaml").open("a", encoding="utf-8") as stream:
        stream.write(tag(attempt, name))
    assert command("report", folder).exit_code == 2


YAML = (yaml_card, yaml_threat_model, yaml_data_card, yaml_run)


# ----------------------------------------------------------------------------------------------------- everything else
def code(attempt: Attempt, folder: Path) -> Path:
    """A folder with a card that names code in a file beside it, which would make the canary when imported."""
    folder.mkdir(parents=True)
    (folder / "evil.py").write_text(f"open({str(attempt.canary)!r}, 'w').close()\n", encoding="utf-8")
    card = yaml.safe_load((data_root() / "zoo" / "digits-at" / "card.yaml").read_text(encoding="utf-8"))
    card |= {"name": folder.name, "golden": None, "architecture": {"name": "evil:Net", "arguments": {}}}
    (folder / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    return folder


def code_of_a_zoo_listed(attempt: Attempt) -> None:
    assert (
        command("list", "models", "--zoo", code(attempt, attempt.place / "zoo" / "own").parent).exit_code == 0
    )


def code_of_a_zoo_shown(attempt: Attempt) -> None:
    assert command("show", "own", "--zoo", code(attempt, attempt.place / "zoo" / "own").parent).exit_code == 0


def code_of_a_zoo_named(attempt: Attempt) -> None:
    zoo = code(attempt, attempt.place / "zoo" / "own").parent
    result = command("run", "--zoo", zoo, "--model", "own", "--attacks", "fgsm", "--out", attempt.place / "r")
    assert result.exit_code == 2


def code_of_a_zoo_by_defense(attempt: Attempt) -> None:
    zoo = code(attempt, attempt.place / "zoo" / "own").parent
    result = command(
        "run", "--zoo", zoo, "--defense", "at", "--attacks", "fgsm", "--out", attempt.place / "r"
    )
    assert result.exit_code == 2


def code_of_a_zoo_examined(attempt: Attempt) -> None:
    assert command("doctor", "--zoo", code(attempt, attempt.place / "zoo" / "own").parent).exit_code in (0, 1)


def templates(attempt: Attempt, text: str) -> None:
    """Text in a run that a template engine would run, on the page of a report and on a site."""
    folder = copied(attempt.run, attempt.place / "run")
    card = yaml.safe_load((folder / "cards" / "digits-at.yaml").read_text(encoding="utf-8"))
    card["description"] = text
    (folder / "cards" / "digits-at.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    assert command("report", folder, "--out", attempt.place / "site").exit_code == 0
    pages = "".join(path.read_text(encoding="utf-8") for path in (attempt.place / "site").rglob("*.html"))
    assert "49" not in pages.partition("JINJA")[2][:40]
    assert "<script>open" not in pages


def jinja_expression(attempt: Attempt) -> None:
    templates(
        attempt,
        "JINJA {{ 7 * 7 }} {{ cycler.__init__.__globals__.os.system('touch " + f"{attempt.canary}')" + "}}",
    )


def jinja_statement(attempt: Attempt) -> None:
    templates(
        attempt,
        "{% include '/etc/passwd' %}{% set x = lipsum.__globals__.os.system('touch "
        + f"{attempt.canary}') %"
        + "}",
    )


def html_script(attempt: Attempt) -> None:
    templates(attempt, "</script><script>open('x')</script><img src=x onerror=alert(1)>")


def bundle_with(attempt: Attempt, name: str, content: bytes, mode: int = 0) -> Path:
    """A bundle with one entry more."""
    path = attempt.place / "bundle.zip"
    with zipfile.ZipFile(attempt.run.parent / "run.zip") as whole, zipfile.ZipFile(path, "w") as archive:
        for entry in whole.namelist():
            archive.writestr(entry, whole.read(entry))
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, content)
    return path


def zip_path(attempt: Attempt, name: str, mode: int = 0, content: bytes = b"x") -> None:
    path = bundle_with(attempt, name, content, mode)
    assert command("verify", path, "--files-only").exit_code == 2
    assert command("report", path).exit_code == 2


def zip_parents(attempt: Attempt) -> None:
    zip_path(attempt, "../" * 30 + str(attempt.canary).lstrip("/"))


def zip_absolute(attempt: Attempt) -> None:
    zip_path(attempt, str(attempt.canary))


def zip_symlink(attempt: Attempt) -> None:
    zip_path(attempt, "cards/link.yaml", 0o120777, str(attempt.canary).encode())


def zip_module(attempt: Attempt) -> None:
    zip_path(attempt, "robbench.py", content=f"open({str(attempt.canary)!r}, 'w')".encode())


def safetensors_metadata(attempt: Attempt) -> None:
    """Metadata that names a loader, as some formats do."""
    (attempt.place / "model").mkdir()
    header = json.dumps(
        {"__metadata__": {"format": "pickle", "code": f"os.system('touch {attempt.canary}')"}}
    ).encode()
    (attempt.place / "model" / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    used(card_with(attempt, "w.safetensors"))


def safetensors_header_of_exabytes(attempt: Attempt) -> None:
    (attempt.place / "model").mkdir()
    (attempt.place / "model" / "w.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    used(card_with(attempt, "w.safetensors"))


def header_of_an_array(attempt: Attempt) -> None:
    """An npy header is the text of a Python dict."""
    folder = data_folder(attempt.place / "data")
    header = f"__import__('os').system('touch {attempt.canary}')\n".encode()
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(folder / "test.npz", "w") as archive:
        archive.writestr("x.npy", array)
        archive.writestr("y.npy", array)
    card = yaml.safe_load((folder / "card.yaml").read_text(encoding="utf-8"))
    card["splits"]["test"]["sha256"] = sha256_file(folder / "test.npz")
    (folder / "card.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    assert command("show", folder).exit_code == 2


def shell_words(attempt: Attempt) -> None:
    name = f"$(touch {attempt.canary}); `touch {attempt.canary}` | touch {attempt.canary}"
    assert command("run", "--model", name, "--attacks", name, "--out", attempt.place / "r").exit_code == 2
    assert command("show", name).exit_code == 2


def formula(attempt: Attempt) -> None:
    """A note that a spreadsheet would run, in the table of a run."""
    folder = copied(attempt.run, attempt.place / "run")
    run = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    for cell in run["cells"]:
        cell["defense"] = f"=cmd|'/C touch {attempt.canary}'!A0"
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    if command("report", folder).exit_code == 0:
        text = (folder / "leaderboard.csv").read_text(encoding="utf-8")
        assert ",=cmd" not in text
        assert ',"=cmd' not in text


OTHERS = (
    code_of_a_zoo_listed,
    code_of_a_zoo_shown,
    code_of_a_zoo_named,
    code_of_a_zoo_by_defense,
    code_of_a_zoo_examined,
    jinja_expression,
    jinja_statement,
    html_script,
    zip_parents,
    zip_absolute,
    zip_symlink,
    zip_module,
    safetensors_metadata,
    safetensors_header_of_exabytes,
    header_of_an_array,
    shell_words,
    formula,
)
ATTEMPTS: list[tuple[str, Callable[[Attempt], None]]] = [
    *(
        (f"{make.__name__} {name}", lambda a, make=make, name=name: make(a, name))
        for make in PICKLES
        for name in PAYLOADS
    ),
    *(
        (f"{make.__name__} {name}", lambda a, make=make, name=name: make(a, name))
        for make in YAML
        for name in TAGS
    ),
    *((make.__name__, make) for make in OTHERS),
]


@pytest.mark.parametrize("attempt", [run for _, run in ATTEMPTS], ids=[name for name, _ in ATTEMPTS])
def test_no_code_runs(
    attempt: Callable[[Attempt], None], tmp_path: Path, undisturbed: Path, bundle: Path
) -> None:
    assert bundle.is_file()
    (tmp_path / "canary_module.py").write_text(
        f"open({str(tmp_path / CANARY)!r}, 'w').close()\n", encoding="utf-8"
    )
    attempt(Attempt(tmp_path, undisturbed))
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_payloads_would_run(name: str, tmp_path: Path) -> None:
    """What the attempts carry works: a plain unpickling makes the canary."""
    made = pickle.loads(pickle.dumps(payloads(tmp_path / CANARY)[name]))
    if isinstance(made, io.IOBase):
        made.close()
    assert (tmp_path / CANARY).exists()
