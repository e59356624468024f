"""The zoo: one folder a model with card.yaml, weights and golden tensors. No torch here."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from robbench.cards import DetectorCard, ModelCard
from robbench.core.errors import SUGGESTED, UserError, known_name, nearest, unknown_name
from robbench.core.resources import cache_folder, data_root, existing_folder, sha256_file
from robbench.core.schema import load_yaml, read_yaml
from robbench.models.code import SCHEMES, classes_in, find_code, has_scheme, is_code, pinned
from robbench.models.entry import DetectorEntry, ModelRequest, ZooEntry
from robbench.specs import ModelKind


def read_entry(path: Path, checkpoints: Path | None = None) -> ZooEntry:
    """The model in `path`: a folder with card.yaml, or the card itself."""
    card = path / "card.yaml" if path.is_dir() else path
    if not card.is_file():
        raise UserError(f"{str(path)!r} has no card.yaml; name a zoo model, a model folder or a card file")
    if is_detector_card(card):
        raise UserError(f"{str(path)!r} is a detector, not a model; name the classifier that its card names")
    try:
        shipped = data_root() / "zoo" in card.parents
        found = _shipped_card(card, card.stat().st_mtime_ns) if shipped else load_yaml(card, ModelCard)
        return ZooEntry(found, card.parent, checkpoints)
    except UserError as error:
        raise UserError(f"{error}{_hash_to_paste(card)}") from error


@cache
def _shipped_card(path: Path, _modified: int) -> ModelCard:
    """A card of the shipped zoo, read once a process: 35 cards take half a second."""
    return load_yaml(path, ModelCard)


def _hash_to_paste(card: Path) -> str:
    """Behind the message about a malformed card without a sha256 of its weights: the right one; "" where none helps."""
    try:
        content = read_yaml(card)
        weights = content["weights"] if isinstance(content, dict) else None
        file = card.parent / str(weights["file"]) if isinstance(weights, dict) else None
        given = weights.get("sha256") if isinstance(weights, dict) else None
    except (UserError, KeyError):
        return ""
    if file is None or re.fullmatch("[0-9a-f]{64}", str(given)) or not file.is_file():
        return ""
    return f"; for {file.name} as it is write `sha256: {sha256_file(file)}` under weights"


def is_detector_card(card: Path) -> bool:
    """Whether a card says `kind: detector`; told by its text, since it takes long to parse every card of a zoo."""
    try:
        return re.search(rb"^kind:\s*['\"]?detector\b", card.read_bytes(), re.MULTILINE) is not None
    except OSError:  # for its reader to say what is wrong
        return False


def is_detector(name: str) -> bool:
    """Whether `name` is the path of a detector's card, or of a folder with one."""
    path = Path(name)
    return _is_card(path) and is_detector_card(path / "card.yaml" if path.is_dir() else path)


def read_detector(path: Path) -> DetectorEntry:
    """The detector in `path`: a folder with card.yaml, or the card itself."""
    card = path / "card.yaml" if path.is_dir() else path
    return DetectorEntry(load_yaml(card, DetectorCard), card.parent)


def detector_entries(extra: str | Path | None = None) -> dict[str, DetectorEntry]:
    """Every detector shipped and, with `--zoo DIR`, the user's, by name."""
    found: dict[str, DetectorEntry] = {}
    for card in (card for folder in _folders(extra) for card in sorted(folder.glob("*/card.yaml"))):
        if not is_detector_card(card):
            continue
        entry = read_detector(card)
        if entry.card.name in found:
            raise UserError(
                f"{card}: detector {entry.card.name!r} exists already in {found[entry.card.name].folder}; "
                f"rename it in its card"
            )
        found[entry.card.name] = entry
    return found


def find_detector_entry(name: str, entries: dict[str, DetectorEntry]) -> DetectorEntry:
    """The detector called `name`, or the one in the folder or card file `name`."""
    if name in entries:
        return entries[name]
    if not _is_card(Path(name)):
        return entries[known_name("model", name, entries, "or give the folder of a detector")]
    if not is_detector(name):
        raise UserError(f"{name!r} is no detector; name the folder that robbench train --detector wrote")
    return read_detector(Path(name))


def guarded_entry(detector: DetectorEntry, entries: Mapping[str, ZooEntry]) -> ZooEntry:
    """The classifier of a detector's card, found among `entries`, guarded by the detector; `UserError` without it."""
    wanted, name = detector.card.classifier, detector.card.name
    same = [one for one in entries.values() if one.card.function_hash == wanted.function_hash]
    found = entries.get(wanted.name) or next(iter(same), None)
    if found is None:
        raise UserError(
            f"--model {name!r} is a detector of classifier {wanted.name!r}, which is not in the zoo; name the folder "
            f"that holds both with --zoo"
        )
    if detector.card.input_shape != found.card.input_shape:
        raise UserError(
            f"--model {name!r} is a detector of images {detector.card.input_shape}, its classifier {wanted.name!r} "
            f"takes images {found.card.input_shape}; restore its card, or train it again"
        )
    return replace(found, card=found.card.guarded(detector.card), guard=detector)


def _find_guarded(
    name: str, entries: dict[str, ZooEntry], detectors: Mapping[str, DetectorEntry]
) -> ZooEntry | None:
    if name in detectors and name in entries:
        raise UserError(
            f"{name!r} is a model in {entries[name].folder} and a detector in {detectors[name].folder}; "
            f"rename one in its card"
        )
    if name not in detectors and not is_detector(name):
        return None
    return guarded_entry(detectors.get(name) or read_detector(Path(name)), entries)


def _folders(extra: str | Path | None) -> list[Path]:
    """The shipped zoo and the one of `--zoo DIR`."""
    folders = [data_root() / "zoo"]
    if extra is not None:
        folders += [] if _shipped(own := existing_folder(extra, "--zoo"), folders[0]) else [own]
    return folders


def zoo_entries(
    extra: str | Path | None = None, checkpoints: str | Path | None = None
) -> dict[str, ZooEntry]:
    """Every model shipped and, with `--zoo DIR`, the user's, by name; a name given twice is an error. Detectors are no
    models (`detector_entries`).

    checkpoints: folder of `--checkpoints`, where weights that do not lie beside their card are looked for.
    """
    held = None if checkpoints is None else existing_folder(checkpoints, "--checkpoints")
    folders, entries = _folders(extra), dict[str, ZooEntry]()
    for folder, card in ((f, c) for f in folders for c in sorted(f.glob("*/card.yaml"))):
        if is_detector_card(card):
            continue
        # A folder of models may be a download: its cards run no code unless the user names one (`find_model`).
        entry = replace(read_entry(card.parent, held), trusted=folder == folders[0])
        if entry.card.name in entries:
            raise UserError(
                f"{card}: model {entry.card.name!r} exists already in {entries[entry.card.name].folder}; "
                f"leave --zoo out and name the model by its folder (--model PATH), or rename it in its card"
            )
        entries[entry.card.name] = entry
    return entries


def _shipped(folder: Path, shipped: Path) -> bool:
    """Whether `folder` is the shipped zoo itself; `UserError` when it holds no model at all."""
    if not any(folder.glob("*/card.yaml")):
        hint = "; it is a model itself, name the folder around it" if (folder / "card.yaml").exists() else ""
        step = hint or "; name the folder that `robbench train` wrote its models to"
        raise UserError(f"--zoo {str(folder)!r} has no model folder (NAME/card.yaml) in it{step}")
    return shipped.is_dir() and folder.samefile(shipped)


def checkpoint_folders(named: Path | None) -> list[Path]:
    """Where weights that do not lie beside their card are looked for: --checkpoints, else ROBBENCH_CHECKPOINTS; then
    the cache of downloads."""
    if named is not None:
        return [existing_folder(named, "--checkpoints"), cache_folder("checkpoints")]
    value = os.environ.get("ROBBENCH_CHECKPOINTS")
    return [*([existing_folder(value, "ROBBENCH_CHECKPOINTS")] if value else []), cache_folder("checkpoints")]


def present_weights(entry: ZooEntry) -> Path | None:
    """The weights file of a card where it lies on this machine, unchecked; None when it does not."""
    folders = [entry.folder, *checkpoint_folders(entry.checkpoints)]
    return next((path for folder in folders if (path := folder / entry.card.weights.file).is_file()), None)


def find_model(
    name: str,
    entries: dict[str, ZooEntry],
    kind: ModelKind = "classifier",
    requested: ModelRequest | None = None,
    detectors: Mapping[str, DetectorEntry] | None = None,
) -> ZooEntry:
    """The zoo model called `name`, the model in the folder or card file `name`, or another library's ("timm:NAME").

    kind: what the caller looks for; an unknown name lists the models of that kind. requested: the data set and the
    folder of checkpoints; without it there are no other libraries' models. detectors: names of these, and folders of
    others, stand for the classifiers that they guard; None where a guarded classifier is of no use.
    """
    if detectors is not None and (guarded := _find_guarded(name, entries, detectors)) is not None:
        return guarded
    if name in entries:
        return entries[name]
    if ":" in name and (found := _of_library(name, requested)) is not None:
        return found
    if _is_card(Path(name)):
        return pinned(read_entry(Path(name), requested.checkpoints if requested is not None else None))
    noun = "model" if kind == "classifier" else kind
    if (problem := _misnamed(noun, name)) is not None:
        raise problem
    known = [known for known, entry in entries.items() if entry.card.kind == kind]
    known += detectors or () if kind == "classifier" else ()
    meant = known_name(noun, name, known, "or give a model folder or card.yaml")
    return entries[meant] if meant in entries else guarded_entry((detectors or {})[meant], entries)


def is_model_card(name: str) -> bool:
    """Whether `name` is the path of a model's card, or of a folder with one; not of a data set's."""
    path = Path(name)
    card = path / "card.yaml" if _is_card(path) and path.is_dir() else path
    try:
        content = read_yaml(card) if _is_card(path) and card.is_file() else None
    except UserError:
        return True  # for its reader to say what is wrong
    return isinstance(content, dict) and "splits" not in content


def _is_card(path: Path) -> bool:
    try:
        return path.is_dir() or (path.suffix in (".yaml", ".yml") and path.exists())
    except OSError:  # no path could be called that
        return False


WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".tar", ".t7")
FILES = (".yaml", ".yml", ".py", ".onnx", *WEIGHTS)


def _misnamed(noun: str, name: str) -> UserError | None:
    """What is missing of a model that is named by its class, a file or a path; None for other names."""
    path = Path(name)
    if is_code(name):
        return _without_weights(noun, name)
    try:
        found, alike = path.is_file(), path.suffix in FILES or "/" in name
    except OSError:  # no path could be called that
        return None
    if not found and not alike:
        return None
    return UserError(f"--{noun} {name!r} {_step_for(path, name) if found else _absent(path)}")


def require_class(name: str) -> None:
    """`UserError` unless `name` has the form "module:Class" or "file.py:Class"."""
    if not is_code(name) or has_scheme(name):
        problem = None if is_code(name) else _misnamed("model", name)
        raise problem or UserError(f"{name!r} names no class; give module:Class, as in mynet:MyNet")


def _without_weights(noun: str, name: str) -> UserError:
    module, _, attribute = name.rpartition(":")
    if find_code(name).file is not None:
        return UserError(
            f"--{noun} {name!r} names a class without its weights; add them in robbench run: --weights FILE, elsewhere "
            f"name the card that robbench init writes"
        )
    schemes = [f"{scheme}:{attribute}" for scheme in nearest(module, SCHEMES)]
    step = f"there is no module {module} in the folder you are in, and none is installed"
    return unknown_name(noun, name, schemes, step)


def _absent(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path.cwd()
    near = nearest(path.name, [one.name for one in folder.iterdir() if one.suffix in FILES or one.is_dir()])
    listed = f"; near it: {', '.join(str(path.parent / one) for one in near)}" if near else ""
    return f"is no file or folder{listed}; name a zoo model, a model folder, a card, or module:Class with --weights"


def _step_for(path: Path, name: str) -> str:
    """What to write in place of a file that is there and is no card."""
    if path.suffix == ".py":
        classes = classes_in(path)
        one = classes[0] if len(classes) == 1 else "CLASS"
        which = f" ({', '.join(classes[:SUGGESTED])})" if classes else ""
        return f"is Python code; name its class{which} and weights: --model {name}:{one} --weights FILE"
    if path.suffix == ".onnx":
        return f"is an ONNX file; give --model onnx:{name}"
    return (
        f"is a file of weights without the network they belong to; name its class too: "
        f"--model module:Class --weights {name}"
    )


def _of_library(name: str, requested: ModelRequest | None) -> ZooEntry | None:
    """The model behind "torchvision:resnet50"; None when what comes before the colon is no scheme."""
    if not has_scheme(name):
        return None
    from robbench.models.sources import named_model  # which needs torch

    if requested is None or not requested.dataset:
        raise UserError(
            f"{name!r} can be named in robbench run only, which knows its data set; "
            f"here name a zoo model, a model folder or a card.yaml"
        )
    return named_model(name, requested)


def find_models(
    defense: str, dataset: str, entries: dict[str, ZooEntry], kind: ModelKind = "classifier"
) -> list[ZooEntry]:
    """Every model of `kind` for `dataset` trained by `defense`; `UserError` that says how to train one when none is."""
    of_kind = [e.card for e in entries.values() if (e.card.kind, e.card.dataset) == (kind, dataset)]
    found = [entries[card.name] for card in of_kind if card.defense == defense]
    if not found:
        here = sorted({card.defense for card in of_kind})
        architecture = " --architecture glow" if kind == "flow" else ""
        raise UserError(
            f"--defense {defense!r}: the zoo has no {dataset} {kind} of that defense "
            f"(it has: {', '.join(here) or 'none'}); train one: "
            f"robbench train --defense {defense} --dataset {dataset}{architecture}, then add --zoo robbench-training"
        )
    return found


def default_flow(dataset: str, entries: dict[str, ZooEntry]) -> ZooEntry | None:
    """The flow latent attacks use on `dataset` unless --flow names another: the zoo's `<dataset>-glow`."""
    entry = entries.get(f"{dataset}-glow")
    return entry if entry is not None and entry.card.kind == "flow" else None
