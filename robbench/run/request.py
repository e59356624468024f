"""What `robbench run` was asked for, each argument as the user gave it; `run.plan` and `experiments.runs` check it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from robbench.data.card import family
from robbench.models.entry import ZooEntry
from robbench.run.ray_backend import BackendName
from robbench.specs import ResolvedAttack


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How and on what to run: what a matrix and an experiment have in common.

    Attributes:
        n: number of test images; None for the default of the matrix or experiment.
        seed: seed of the drawn images and of every random number of the attacks.
        device: "auto", "cpu", "cuda" or "cuda:N".
        batch_size: images at once.
        compiled: whether attacks search classifiers with torch.compile; verdicts never do.
        threat_models: folder of further threat models.
        zoo: folder of further models.
        checkpoints: folder of weights that cards name.
        data_dir: folder of data sets in torchvision's layout.
        data: folder of a data set of one's own.
        keep_examples: number of adversarial images kept of each cell.
        backend: "local" or "ray".
        ray_address: see `RayOptions.address`.
        gpus_per_cell: see `RayOptions.gpus_per_cell`.
        options: what was given on the command line, as --config reads it; for run.yaml.
    """

    n: int | None = None
    seed: int = 0
    device: str = "auto"
    batch_size: int = 256
    compiled: bool = False
    threat_models: Path | None = None
    zoo: Path | None = None
    checkpoints: Path | None = None
    data_dir: Path | None = None
    data: Path | None = None
    keep_examples: int = 16
    backend: BackendName = "local"
    ray_address: str | None = None
    gpus_per_cell: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings alone, by name: of an experiment for its matrix."""
        return pick_settings(vars(self))


def pick_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `values` that are fields of `RunSettings`."""
    return {one.name: values[one.name] for one in fields(RunSettings)}


@dataclass(frozen=True)
class RunRequest(RunSettings):
    """A matrix: models, attacks and settings.

    Attributes:
        attacks: names or groups of attacks.
        defenses: names of defenses, each for all its models in the zoo.
        models: names in the zoo, model folders, or models of other libraries ("torchvision:NAME").
        dataset: name of the data set, that in the card of `data` where that is given. `n` is all of digits and 1,000 of
            any other data set unless given.
        flow: normalizing flow of latent attacks and of bits/dim; None for the data set's in the zoo.
        epsilons: image budgets in place of the data set's, one cell each.
        etas: latent budgets in place of the data set's, one cell each.
        steps: numbers of steps in place of the attacks' own, one cell each.
        target: "random", "least-likely" or a class, which targeted attacks must reach; None for untargeted attacks.
        surrogate: name of the model on which every attack searches, for transfer attacks; None for the attacked one.
        likelihood_dtype: "float32" or "float64", in which flows score images; None for float32.
        likelihood_draws: noise draws of the importance-weighted bits/dim by which attacks on flows are scored; None
            and 1 for a single draw.
        own: models that were read from a class and weights, by the name in `models` that stands for them.
        resolved: attacks with every number filled in, in place of `attacks` and budgets.
        note: what every table of the run says of it.
    """

    attacks: tuple[str, ...]
    defenses: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    dataset: str = "digits"
    flow: str | None = None
    epsilons: tuple[float, ...] = ()
    etas: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    target: str | int | None = None
    surrogate: str | None = None
    likelihood_dtype: str | None = None
    likelihood_draws: int | None = None
    own: Mapping[str, tuple[ZooEntry, ...]] = field(default_factory=dict)
    resolved: tuple[ResolvedAttack, ...] = ()
    note: str = ""

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data set, then the one its card says it is like: whose models and budgets are used."""
        return tuple(dict.fromkeys((self.dataset, family(self.dataset, self.data))))
