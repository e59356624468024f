"""Arguments of an experiment run, and the identity of its output folder."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from robbench.core.errors import UserError
from robbench.core.schema import Strict, load_yaml
from robbench.data.card import family, read_folder_card, require_dataset
from robbench.experiments.schema import Experiment, Scale
from robbench.run.request import RunSettings

IDENTITY_FILE = "experiment.yaml"


@dataclass(frozen=True)
class ExperimentRequest(RunSettings):
    """What `robbench run --experiment` was asked for. `n` is the experiment's own number, all of the test images times
    the scale, unless given; `seed` is added to the seeds of trainings too.

    Attributes:
        experiment: the table to run.
        scale: how much smaller than the paper's it is run.
        fid_weights: weights file of the Inception network; None downloads it once.
        requested: the user's name of the experiment.
    """

    experiment: Experiment
    scale: Scale = field(default_factory=Scale)
    fid_weights: Path | None = None
    requested: str = ""

    @cached_property
    def dataset(self) -> str:
        """The experiment's data set, or that of `data`, which must be the same or like it; else `UserError`."""
        if self.data is None:
            return self.experiment.dataset
        require_dataset(self.experiment.dataset, self.data)
        return read_folder_card(self.data)[0].name

    @property
    def family(self) -> str:
        """The data set whose budgets apply."""
        return family(self.dataset, self.data)

    @property
    def differs(self) -> str:
        """How the run differs from the experiment (scale, data); empty where it does not."""
        other = f"data set {self.dataset}" if self.dataset != self.experiment.dataset else ""
        return ", ".join(part for part in (self.scale.label, other) if part)

    @property
    def folder_name(self) -> str:
        """ "ijsat-table1-scale0.01-seed0"."""
        return f"{self.experiment.name}{self.scale.suffix}-seed{self.seed}"

    @property
    def note(self) -> str:
        """Note in every table: the experiment's name, its scale, and other data."""
        return ", ".join(part for part in (f"experiment {self.experiment.name}", self.differs) if part)


class Identity(Strict):
    """experiment.yaml of an output folder: its experiment, scale and seed."""

    experiment: str
    scale: float
    seed: int


def identity(request: ExperimentRequest) -> Identity:
    """The identity of a request's output folder."""
    return Identity(experiment=request.experiment.name, scale=request.scale.factor, seed=request.seed)


def check_folder(folder: Path, identity: Identity) -> None:
    """`UserError` when `folder` contains another experiment, or something else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {str(folder)!r} is a file; give a folder")
    path = folder / IDENTITY_FILE
    if path.is_file():
        if (found := load_yaml(path, Identity)) != identity:
            raise UserError(
                f"--out {str(folder)!r} holds {found.experiment} at scale {found.scale:g}, seed {found.seed}; "
                f"give another --out"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"--out {str(folder)!r} holds something else and no {IDENTITY_FILE}; give another --out"
        )
