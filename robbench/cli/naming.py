"""Names on the command line of `run`: what is written in another way is taken for what it means, and that is said."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robbench.cli.base import echo_line, names, resolve_if_known, resolve_option
from robbench.cli.own import OPTIONS, own_models, own_weights
from robbench.core.errors import UserError, known_name
from robbench.models.code import has_scheme, is_code
from robbench.models.zoo import find_model, zoo_entries
from robbench.specs import CLEAN_IS_THERE, attack_name, threat_models, without_clean

if TYPE_CHECKING:
    from robbench.models.entry import OwnWeights, ZooEntry


def settle_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `run`, after `read_data`, with names as robbench has them, a data set, and the user's own networks
    under `own`."""
    own, found = own_weights(rest := dict(options)), dict[str, Any]()
    entries = zoo_entries(rest["zoo"], rest["checkpoints"])
    found["attacks"] = attack_names(rest["attacks"], rest["threat_models"])
    found["defenses"] = _defenses(names("--defense", rest["defenses"]), entries)
    found["models"] = tuple(_model(name, entries) for name in names("--model", rest["models"]))
    surrogate = rest["surrogate"]
    found["surrogate"] = None if surrogate is None else _model(surrogate, entries, "--surrogate")
    classes = [name for name in found["models"] if is_class(name, entries)]
    _require_a_class(own, classes, found["models"], entries)
    given = rest["dataset"] is not None
    dataset = rest["dataset"]
    if dataset is None:
        dataset = _of_cards([name for name in found["models"] if name not in classes], entries)
    models = own_models(classes, own, dataset, rest) if own.files else {}
    for model in (one for listed in models.values() for one in listed):
        dataset = model.entry.card.dataset
        echo_line(model.text, err=True)
    if not given and not models and dataset not in (None, "digits"):
        echo_line(f"data set: {dataset}, that of the models' cards", err=True)
    found["own"] = {name: tuple(one.entry for one in listed) for name, listed in models.items()}
    return {**rest, **found, "dataset": "digits" if dataset is None else dataset}


def attack_names(values: Sequence[str], folder: Path | None) -> tuple[str, ...]:
    """The attacks meant by comma lists, without the clean accuracy (`without_clean`), which is said."""
    written = names("--attacks", values)
    attacks = without_clean(written)
    if len(attacks) < len(written):
        left_out = ", ".join(name for name in written if name not in attacks)
        echo_line(f"{CLEAN_IS_THERE}; {left_out} is left out", err=True)
    models = threat_models(folder)
    return tuple(
        dict.fromkeys(
            resolve_option("--attacks", name, lambda one: attack_name(one, models)) for name in attacks
        )
    )


def _defenses(written: Iterable[str], entries: Mapping[str, "ZooEntry"]) -> tuple[str, ...]:
    known = {entry.card.defense for entry in entries.values()}
    return tuple(
        resolve_if_known("--defense", name, lambda one: known_name("defense", one, known)) for name in written
    )


def _model(written: str, entries: Mapping[str, "ZooEntry"], option: str = "--model") -> str:
    if written in entries or ":" in written or _there(written):
        return written
    return resolve_if_known(option, written, lambda one: known_name("model", one, entries))


def _there(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # no path could be called that
        return False


def is_class(name: str, entries: Mapping[str, "ZooEntry"]) -> bool:
    """Whether a model is named by its class, "module:Class"."""
    return name not in entries and not has_scheme(name) and is_code(name)


def _require_a_class(
    own: "OwnWeights", classes: Sequence[str], models: Sequence[str], entries: dict[str, "ZooEntry"]
) -> None:
    """`UserError` for weights without a class, or a class without weights."""
    if own.files and classes:
        return
    if classes:
        find_model(classes[0], entries)  # says what is missing
    for name in models if own != type(own)() else ():
        if not has_scheme(name):
            find_model(name, entries)
    if own != type(own)():
        listed = ", ".join(f"--{option.replace('_', '-')}" for option in OPTIONS)
        raise UserError(f"{listed} are of a network that is named by its class; give --model module:Class")


def _of_cards(models: Sequence[str], entries: dict[str, "ZooEntry"]) -> str | None:
    """The data set of the cards of named models; None without any. `UserError` when they have several."""
    found: dict[str, str] = {}
    for name in models:
        try:
            found.setdefault(find_model(name, entries).card.dataset, name)
        except UserError:  # of another library, which needs the data set; or unknown, which the plan says
            continue
    if len(found) > 1:
        listed = ", ".join(f"{dataset} ({name})" for dataset, name in found.items())
        raise UserError(f"the models are of {len(found)} data sets: {listed}; run those of one at a time")
    return next(iter(found), None)
