"""Options that name a network by its class, and `robbench init`, which writes its card. Only click is imported here."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from robbench.cli.base import (
    FolderOrFile,
    Text,
    data_dir_option,
    data_option,
    dataset_option,
    echo_line,
)
from robbench.cli.dataset import choose_dataset
from robbench.core.errors import UserError
from robbench.core.numerals import number

if TYPE_CHECKING:
    from robbench.models.entry import OwnWeights
    from robbench.models.own import Images, OwnModel

Command = TypeVar("Command", bound=Callable[..., Any])
OPTIONS = ("weights", "model_args", "weights_key", "mean", "std")


def own_model_options(command: Command) -> Command:
    """The options that belong to `--model module:Class`."""
    for option in reversed(
        (
            click.option(
                "--weights", multiple=True, type=FolderOrFile(), help="Weights of --model module:Class."
            ),
            click.option(
                "--model-args", type=Text(), help="Arguments of that class: '{\"num_classes\": 10}'."
            ),
            click.option("--weights-key", type=Text(), help="Entry of the file that holds its weights."),
            click.option(
                "--mean", multiple=True, help="Its normalisation, if it has none inside: 0.49,0.48,0.45."
            ),
            click.option("--std", multiple=True, help="As --mean; one value is for all channels."),
        )
    ):
        command = option(command)
    return command


def own_weights(options: dict[str, Any]) -> "OwnWeights":
    """What the options of `own_model_options` say; they are taken out of `options`. `UserError` for malformed ones."""
    from robbench.models.entry import OwnWeights

    files, arguments, key, mean, std = (options.pop(option) for option in OPTIONS)
    if bool(mean) != bool(std):
        raise UserError("--mean and --std belong together: (x - mean) / std; give both, or neither")
    scales = {option: _numbers(option, values) for option, values in (("--mean", mean), ("--std", std))}
    if any(value <= 0 for value in scales["--std"]):
        raise UserError(f"--std {','.join(map(str, scales['--std']))}: give numbers above 0")
    return OwnWeights(tuple(files), _arguments(arguments), key, scales["--mean"], scales["--std"])


def _numbers(option: str, values: Sequence[str]) -> tuple[float, ...]:
    texts = [text for value in values for text in value.replace(",", " ").split()]
    found = [number(text) for text in texts]
    if (values and not texts) or None in found:
        raise UserError(
            f"{option} {','.join(values)[:40]!r} is no list of numbers; give {option} 0.49,0.48,0.45"
        )
    return tuple(value for value in found if value is not None)


def _arguments(text: str | None) -> dict[str, Any]:
    from robbench.core.schema import canonical_hash, parse_json

    try:
        found = {} if text is None else parse_json(text)
        canonical_hash(found)  # 1e999 is JSON, and no number
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise UserError(
            f"--model-args {str(text)[:60]!r} is no JSON object; give the class's arguments as in "
            f"--model-args '{{\"num_classes\": 10}}'"
        )
    return found


def own_models(
    classes: Sequence[str], own: "OwnWeights", dataset: str | None, options: Mapping[str, Any]
) -> "dict[str, list[OwnModel]]":
    """The networks named by `classes`, with a weights file each, or one class with several. dataset: of their images;
    None for the one built-in data set that fits. options: `data_dir` and `data`."""
    from robbench.models.own import list_built_in_images, own_model

    if len(own.files) != len(classes) and len(classes) > 1:
        raise UserError(
            f"{len(classes)} classes and {len(own.files)} weights files: give --weights once for each --model, in order"
        )
    candidates = list_built_in_images() if dataset is None else [_images(dataset, options)]
    found: dict[str, list[OwnModel]] = {}
    for position, file in enumerate(own.files):
        name = classes[min(position, len(classes) - 1)]
        found.setdefault(name, []).append(own_model(name, file, own, candidates))
        candidates = [images for images in candidates if images.dataset == found[name][-1].entry.card.dataset]
    return found


def _images(dataset: str, options: Mapping[str, Any]) -> "Images":
    """Shape and classes of a data set; one that is not built in is loaded."""
    from robbench.data import load_dataset
    from robbench.models.own import Images, list_built_in_images

    known = {images.dataset: images for images in list_built_in_images()}
    if dataset in known and options["data"] is None:
        return known[dataset]
    loaded = load_dataset(dataset, options["data_dir"], options["data"])
    return Images(dataset, loaded.shape, loaded.classes)


@click.command()
@click.argument("model", metavar="MODULE:CLASS")
@own_model_options
@click.option("--name", type=Text(), help="Name of the model in tables.  [default: from weights and class]")
@click.option(
    "--out", type=FolderOrFile(), default=Path("."), help="Folder of the card.  [default: this one]"
)
@dataset_option
@data_option
@data_dir_option
def init(model: str, name: str | None, out: Path, **options: Any) -> None:
    """Write the card of a network of your own, its weights and source pinned by their sha256.

    Example: robbench init mynet:MyNet --weights mynet.pt --dataset digits
    """
    from robbench.models.own_card import write_card
    from robbench.models.zoo import require_class

    own = own_weights(options)
    require_class(model)
    if len(own.files) != 1:
        raise UserError(f"robbench init {model} needs the weights of that network: --weights FILE, once")
    given = options["dataset"] is not None or options["data"] is not None
    dataset = None
    if given:
        dataset, options["data"] = choose_dataset(options["dataset"], options["data"])
    found = own_models([model], own, dataset, options)[model][0]
    path = write_card(found, out, name)
    echo_line(found.text, err=True)
    echo_line(f"CARD {path.absolute()}")
    data = "" if options["data"] is None else f" --data {quote_path(options['data'])}"
    echo_line(f"Use it: robbench run --model {quote_path(path)}{data} --attacks pgd20,aa")


def quote_path(path: Path) -> str:
    """A path as a shell takes it."""
    import shlex

    return shlex.quote(str(path))
