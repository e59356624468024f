"""What `robbench show` prints of an attack, a model, a defense and a detector."""

import inspect
from typing import TYPE_CHECKING

from robbench.cli.base import echo_line, echo_text
from robbench.cli.catalog_json import Folders, attack, attack_parameters
from robbench.core.schema import dump_yaml
from robbench.models.zoo import find_detector_entry, present_weights

if TYPE_CHECKING:
    from robbench.defenses import Defense
    from robbench.detectors import Detector


def show_model(name: str, folders: Folders) -> None:
    """Where the card of a model or detector and its weights lie, then the card."""
    if folders.has_detector(name):
        detector = find_detector_entry(name, folders.detectors)
        missing = "not on this machine; restore it, or train it again"
        echo_line(f"# {detector.folder}")
        echo_line(f"# weights: {detector.file if detector.file.is_file() else missing}")
        echo_text(dump_yaml(detector.card))
        return
    entry = folders.entry(name)
    weights = present_weights(entry)
    get = "downloaded when first used" if entry.card.weights.urls else "name their folder with --checkpoints"
    echo_line(f"# {entry.folder}")
    echo_line(f"# weights: {weights or f'not on this machine; {get}'}")
    echo_text(dump_yaml(entry.card))


def show_defense(name: str, folders: Folders) -> None:
    """What the defenses of that name do, for every kind of model they train, and their parameters."""
    from robbench.defenses import defense_kinds, find_defense

    for kind in defense_kinds(name):
        echo_line(f"trains a {kind}:")
        _show_trained(find_defense(name, kind))


def show_detector(name: str, folders: Folders) -> None:
    """What a detector looks at, and its parameters."""
    from robbench.detectors import DETECTORS

    _show_trained(DETECTORS.get(name))


def _show_trained(found: "type[Defense] | type[Detector]") -> None:
    echo_text(inspect.getdoc(found) or "")
    if found.Parameters.model_fields:
        echo_text("\nParameters (--set KEY=VALUE):")
    for field, info in found.Parameters.model_fields.items():
        echo_line(f"  {field} = {info.get_default(call_default_factory=False)!r}")


def show_attack(name: str, folders: Folders) -> None:
    """The attack with every parameter filled in, then its budgets on every data set; of a group its members."""
    owner = folders.owner(name)
    if name in owner.groups:
        echo_line(_flat(owner.groups[name].description))
        echo_line(_flat(owner.description))
        echo_text("  " + "\n  ".join(owner.members(name)))
        return
    spec, parameters = owner.attacks[name], attack_parameters(name, owner)
    echo_line(
        f"threat model {owner.name} ({owner.space}, {spec.norm or owner.norm}): {_flat(owner.description)}"
    )
    echo_line(_flat(spec.description))
    echo_line(f"reference: {spec.reference or '-'}")
    echo_line(f"algorithm: {spec.algorithm}")
    for key, value in parameters.model_dump().items():
        echo_line(f"  {key}: {value}")
    echo_line(f"{'data set':14} {'epsilon':10} {'eta':10} {'step size':18} note")
    for numbers in attack(name, folders)["budgets"]:
        _show_budget(**numbers, note=owner.budgets_of(name)[numbers["dataset"]].note)


def _show_budget(
    dataset: str, epsilon: float | None, eta: float | None, step_sizes: list[float] | None, note: str
) -> None:
    """Budgets of an attack on a data set, and absolute step sizes: "-" for an algorithm that chooses its own."""
    if epsilon is None and eta is None:
        echo_line(f"{dataset:14} none by default; give --epsilon or --eta")
        return
    sizes = "-" if step_sizes is None else ", ".join(f"{size:g}" for size in step_sizes)
    echo_line(f"{dataset:14} {_number(epsilon):10} {_number(eta):10} {sizes:18} {note}".rstrip())


def _flat(text: str) -> str:
    """A description, whose lines in its file mean nothing, as one line."""
    return " ".join(text.split())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
