"""The zoo: one folder a model with card.yaml, weights and golden tensors. No torch here."""

import os
from dataclasses import replace
from pathlib import Path

from robbench.cards import ModelCard
from robbench.core.errors import UserError, unknown_name
from robbench.core.resources import cache_folder, data_root, existing_folder
from robbench.core.schema import load_yaml
from robbench.models.entry import ModelRequest, ZooEntry
from robbench.specs import ModelKind


def read_entry(path: Path, checkpoints: Path | None = None) -> ZooEntry:
    """The model in `path`: a folder with card.yaml, or the card itself."""
    card = path / "card.yaml" if path.is_dir() else path
    if not card.is_file():
        raise UserError(f"{str(path)!r} has no card.yaml; name a zoo model, a model folder or a card file")
    return ZooEntry(load_yaml(card, ModelCard), card.parent, checkpoints)


def zoo_entries(
    extra: str | Path | None = None, checkpoints: str | Path | None = None
) -> dict[str, ZooEntry]:
    """Every model shipped and, with `--zoo DIR`, the user's, by name; a name given twice is an error.

    checkpoints: folder of `--checkpoints`, where weights that do not lie beside their card are looked for.
    """
    held = None if checkpoints is None else existing_folder(checkpoints, "--checkpoints")
    folders = [data_root() / "zoo"]
    if extra is not None:
        folders += [] if _shipped(own := existing_folder(extra, "--zoo"), folders[0]) else [own]
    entries: dict[str, ZooEntry] = {}
    for folder, card in ((f, c) for f in folders for c in sorted(f.glob("*/card.yaml"))):
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
) -> ZooEntry:
    """The zoo model called `name`, the model in the folder or card file `name`, or another library's ("timm:NAME").

    kind: what the caller looks for; an unknown name lists the models of that kind. requested: the data set and the
    folder of checkpoints; without it there are no other libraries' models.
    """
    if name in entries:
        return entries[name]
    if ":" in name and (found := _of_library(name, requested)) is not None:
        return found
    path = Path(name)
    try:
        named = path.is_dir() or (path.suffix in (".yaml", ".yml") and path.exists())
    except OSError:  # no path could be called that
        named = False
    if named:
        return read_entry(path, requested.checkpoints if requested is not None else None)
    known = [known for known, entry in entries.items() if entry.card.kind == kind]
    noun = "model" if kind == "classifier" else kind
    raise unknown_name(noun, name, known, "or give a model folder or card.yaml")


def _of_library(name: str, requested: ModelRequest | None) -> ZooEntry | None:
    """The model behind "torchvision:resnet50"; None when what comes before the colon is no scheme."""
    from robbench.models.sources import has_scheme, named_model

    if not has_scheme(name):
        return None
    if requested is None:
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
