"""The zoo: one folder a model with card.yaml, weights and golden tensors. No torch here."""

from dataclasses import dataclass
from pathlib import Path

from robbench.cards import ModelCard
from robbench.errors import UserError, unknown_name
from robbench.resources import data_root, existing_folder
from robbench.schema import load_yaml
from robbench.specs import ModelKind


@dataclass(frozen=True)
class ZooEntry:
    """A card and the folder that holds it and the files it names."""

    card: ModelCard
    folder: Path


def read_entry(path: Path) -> ZooEntry:
    """The model in `path`: a folder with card.yaml, or the card itself."""
    card = path / "card.yaml" if path.is_dir() else path
    if not card.is_file():
        raise UserError(f"{str(path)!r} has no card.yaml; name a zoo model, a model folder or a card file")
    return ZooEntry(load_yaml(card, ModelCard), card.parent)


def zoo_entries(extra: str | Path | None = None) -> dict[str, ZooEntry]:
    """Every model shipped and, with `--zoo DIR`, the user's, by name; a name given twice is an error."""
    folders = [data_root() / "zoo"]
    if extra is not None:
        folders += [] if _shipped(own := existing_folder(extra, "--zoo"), folders[0]) else [own]
    entries: dict[str, ZooEntry] = {}
    for card in (c for folder in folders for c in sorted(folder.glob("*/card.yaml"))):
        entry = read_entry(card.parent)
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


def find_model(name: str, entries: dict[str, ZooEntry], kind: ModelKind = "classifier") -> ZooEntry:
    """The zoo model called `name`, or the model in the folder or card file `name`.

    kind: what the caller looks for; an unknown name lists the models of that kind.
    """
    if name in entries:
        return entries[name]
    path = Path(name)
    try:
        named = path.is_dir() or (path.suffix in (".yaml", ".yml") and path.exists())
    except OSError:  # no path could be called that
        named = False
    if named:
        return read_entry(path)
    known = [known for known, entry in entries.items() if entry.card.kind == kind]
    noun = "model" if kind == "classifier" else kind
    raise unknown_name(noun, name, known, "or give a model folder or card.yaml")


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
