"""Writing the card of a network of the user's own, so that it loads from where the card lies."""

import os
from pathlib import Path

from pydantic import ValidationError

from robbench.cards import ModelCard
from robbench.core.errors import UserError
from robbench.core.places import check_output_folder
from robbench.core.resources import write_text_atomically
from robbench.core.schema import yaml_text
from robbench.models.code import find_code
from robbench.models.entry import ZooEntry
from robbench.models.loading import load_model
from robbench.models.own import OwnModel


def write_card(model: OwnModel, folder: Path, name: str | None) -> Path:
    """Write `folder`/NAME.yaml, after the model was loaded by it; returns its path. name: of the model; None for the
    one it has. `UserError` for a card that is there and says something else: nothing is overwritten."""
    card = _placed(model.entry, folder, name or model.entry.card.name)
    path = folder / f"{card.name}.yaml"
    text = yaml_text(card.model_dump(mode="json", exclude_defaults=True))
    if path.exists() and (not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text):
        raise UserError(
            f"{path} exists and says something else; give another --name or --out, or remove it first"
        )
    check_output_folder(folder)
    there = card.weights.model_copy(update={"file": str(model.entry.folder / model.entry.card.weights.file)})
    load_model(ZooEntry(card.model_copy(update={"weights": there}), folder))  # `folder` may not be there yet
    write_text_atomically(path, text)
    return path


def _placed(entry: ZooEntry, folder: Path, name: str) -> ModelCard:
    """The card with the paths of weights and code as they are from `folder`."""
    architecture = entry.card.architecture
    here = folder.resolve()
    code = find_code(architecture.name, *([entry.code] if entry.code else []), entry.folder)
    if code.file is not None and "." not in code.module and code.file.name != "__init__.py":
        beside = find_code(architecture.name, folder)
        if beside.file != code.file or code.file.parent != here:
            path = Path(os.path.relpath(code.file, here)).as_posix()
            architecture = architecture.model_copy(update={"name": f"{path}:{code.attribute}"})
    file = Path(os.path.relpath(entry.folder / entry.card.weights.file, here)).as_posix()
    fields = {
        **entry.card.model_dump(mode="json"),
        "name": name,
        "architecture": architecture.model_dump(mode="json"),
        "weights": {**entry.card.weights.model_dump(mode="json"), "file": file},
    }
    try:
        return ModelCard.model_validate(fields)
    except ValidationError as error:
        raise UserError(
            f"--name {name!r} is no name of a model; give letters, digits, dots and dashes, as in mynet-2"
        ) from error
