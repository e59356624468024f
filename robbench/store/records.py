"""Typed records of a run folder: `run.yaml`, `cells/*/cell.json`, and a whole run read back.

No torch here, and pandas only for type checkers: reading a run folder stays cheap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from robbench.cards import DetectorReference, FlowReference, ModelCard, Side
from robbench.core.memory import Remembers
from robbench.core.precision import withdrawal
from robbench.core.schema import Strict, canonical_hash
from robbench.data.card import DatasetCard
from robbench.specs import SHA256, ModelKind, Name, ResolvedAttack
from robbench.store.record_files import RECORD_VERSION

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["running", "ok", "failed"]
Precision = Literal["fp32", "fp64"]


class CleanScore(Strict):
    """Clean images that a model classifies correctly: `right` of `samples`."""

    right: int
    samples: int


class CellRecord(Strict):
    """cell.json: one (model, attack) cell, everything its results depend on, and its status.

    Attributes:
        schema_version: of the record file.
        hash: address of the cell (`cell_hash`).
        model: name of the model.
        defense: of the model.
        dataset: name of the data set.
        dataset_revision: its revision.
        seed: seed of the run.
        attack: the attack with every number filled in.
        model_sha256: sha256 of the model's weights.
        model_hash: `ModelCard.function_hash` of the model; "" in old records.
        attack_flow: flow through which the attack searches; None for an attack in image space.
        nll_flow: flow that scores the images in bits/dim; None for no scores.
        detector: of a guarded classifier; else None.
        precision: of the scores.
        search_precision: of the search: "fp32", "fp32, compiled"; in old records also a withdrawn one.
        engine: name and version of the code that searched.
        batch_size: images per batch, for attacks whose results depend on it; else None.
        status: "running" until the end is recorded.
        error: why it failed, in one line; else None.
        details: traceback of a failure; else "".
        seconds: computing time, summed over its shards.
        suspicions: reasons to doubt the numbers (gradient masking, probabilities in place of logits).
        device: devices that computed the shards ("cpu", "NVIDIA H200"); "" in old records.
        clean: clean accuracy of a model whose attack failed; else None.
    """

    schema_version: Literal[1, 2] = RECORD_VERSION
    hash: SHA256
    model: str
    defense: str
    dataset: str
    dataset_revision: SHA256
    seed: int
    attack: ResolvedAttack
    model_sha256: SHA256
    model_hash: str = ""
    attack_flow: FlowReference | None = None
    nll_flow: FlowReference | None = None
    detector: DetectorReference | None = None
    precision: Precision = "fp32"
    search_precision: str = "fp32"
    engine: str
    batch_size: int | None = None
    status: Status = "running"
    error: str | None = None
    details: str = ""
    seconds: float = 0.0
    suspicions: tuple[str, ...] = ()
    device: str = ""
    clean: CleanScore | None = None

    @property
    def model_name(self) -> str:
        """The model's name in its card."""
        return self.model

    @property
    def kind(self) -> ModelKind:
        """Kind of the model."""
        return "detector" if self.detector else self.attack.target

    @property
    def decides(self) -> bool:
        """Whether the model decides on a class, guarded or not; not so a flow."""
        return self.attack.target != "flow"

    @property
    def is_adaptive(self) -> bool:
        """Whether the attack knows the detector."""
        return self.attack.target == "detector"

    @property
    def score_name(self) -> str:
        """The accuracy that tables show for the cell, in words."""
        return f"{self.attack.measure}{' with rejection' if self.detector else ''}"

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the number may overstate robustness: its suspicions, and a search precision that was withdrawn."""
        withdrawn = withdrawal(self.search_precision)
        return (*self.suspicions, withdrawn) if withdrawn else self.suspicions

    @property
    def flow(self) -> str | None:
        """Name of the flow through which the attack searched; None for an attack in image space."""
        return self.attack_flow.name if self.attack_flow else None


def cell_hash(
    card: ModelCard,
    attack: ResolvedAttack,
    attack_flow: ModelCard | None,
    nll_flow: ModelCard | None,
    engine: str,
    batch_size: int | None,
    dataset: str,
    dataset_revision: str,
    seed: int,
    precision: Precision = "fp32",
    search_precision: str = "fp32",
) -> str:
    """Address of a cell: sha256 over everything that its rows depend on.

    card, attack_flow, nll_flow: cards of the model (of a guarded classifier with its detector), of the flow through
    which the attack searches, and of the flow that scores images (None for none). attack: as built, with every default
    of its parameters; its label does not count, since it is only its name in tables. The other arguments are those of
    `CellRecord`.
    """
    noise = {"noise_std": card.detector.noise_std} if card.detector else {}
    return canonical_hash(
        {
            **noise,
            "model": card.function_hash,
            "attack_flow": attack_flow.function_hash if attack_flow else None,
            "nll_flow": nll_flow.function_hash if nll_flow else None,
            "attack": attack.identity,
            "precision": precision,
            "search_precision": search_precision,
            "engine": engine,
            "batch_size": batch_size,
            "dataset": dataset,
            "dataset_revision": dataset_revision,
            "seed": seed,
        }
    )


class PlanEntry(Strict):
    """One entry of a plan: the names of a cell's model and attack in tables."""

    hash: SHA256
    model: str
    defense: str
    attack: str


class RunFile(Strict):
    """run.yaml: the identity of a run folder (data set, revision, split, seed) and its last plan.

    Attributes:
        schema_version: of the record file.
        dataset: name of the data set.
        dataset_revision: its revision.
        split: the attacked split.
        seed: seed of the run.
        shape: (C,H,W) of an image.
        class_names: names of the classes.
        data: the data set's card; None in old files.
        n: number of samples.
        models: names of the models, in plan order.
        attacks: labels of the attacks, in plan order.
        cells: the cells, in plan order.
        versions: of the libraries.
        samples: the requested sample ids in the order drawn, as one string (YAML reads a list of 10,000 slowly).
        note: text that every table of the run shows; "" for none.
        options: of the last `robbench run`, as its --config reads them; none in bundles.
        given: how models were named on the command line, by name, where otherwise; none in bundles.
    """

    schema_version: Literal[1, 2] = RECORD_VERSION
    dataset: str
    dataset_revision: SHA256
    split: Literal["test"] = "test"
    seed: int

    shape: tuple[Side, Side, Side]
    class_names: tuple[str, ...]
    data: DatasetCard | None = None
    n: int
    models: tuple[Name, ...]
    attacks: tuple[str, ...]
    cells: tuple[PlanEntry, ...]
    versions: dict[str, str]
    samples: Annotated[str, Field(pattern=r"^[0-9]+( [0-9]+)*$")]
    note: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    given: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.sample_ids)) != self.n or len(self.sample_ids) != self.n:
            raise ValueError(f"n is {self.n}, and samples are {len(self.sample_ids)}, or not all different")
        return self

    @classmethod
    def of(
        cls,
        cells: Sequence[CellRecord],
        sample_ids: Sequence[int],
        dataset: str,
        dataset_revision: str,
        seed: int,
        shape: tuple[int, int, int],
        class_names: tuple[str, ...],
        data: DatasetCard | None,
        versions: dict[str, str],
        note: str,
    ) -> "RunFile":
        """The run of these cells, in this order, on the samples `sample_ids` in the order drawn."""
        return cls(
            dataset=dataset,
            dataset_revision=dataset_revision,
            seed=seed,
            shape=shape,
            class_names=class_names,
            data=data,
            n=len(sample_ids),
            models=tuple(dict.fromkeys(cell.model for cell in cells)),
            attacks=tuple(dict.fromkeys(cell.attack.label for cell in cells)),
            cells=tuple(
                PlanEntry(hash=cell.hash, model=cell.model, defense=cell.defense, attack=cell.attack.label)
                for cell in cells
            ),
            versions=versions,
            samples=join_ids(sample_ids),
            note=note,
        )

    @property
    def sample_ids(self) -> list[int]:
        """The requested sample ids in the order drawn."""
        return [int(part) for part in self.samples.split()]

    def differences(self, other: "RunFile") -> list[str]:
        """Where the identities of two runs differ, as "dataset digits, not mnist"; empty for the same run."""
        logits = [run.data.classes if run.data else None for run in (self, other)]
        pairs = (
            ("dataset", self.dataset, other.dataset),
            ("revision", self.dataset_revision[:12], other.dataset_revision[:12]),
            ("classes", *("all" if one is None else str(list(one)) for one in logits)),
            ("split", self.split, other.split),
            ("seed", self.seed, other.seed),
        )
        return [f"{what} {mine}, not {theirs}" for what, mine, theirs in pairs if mine != theirs]


def join_ids(ids: Sequence[int]) -> str:
    """Sample ids as the string of `RunFile.samples`."""
    return " ".join(str(i) for i in ids)


@dataclass(frozen=True)
class CellResult:
    """A cell and its rows: columns of the ledger, restricted to the requested samples, sorted by sample_id."""

    cell: CellRecord
    rows: "pd.DataFrame"


@dataclass(frozen=True)
class Run(Remembers):
    """A run folder read back.

    Attributes:
        folder: the run folder.
        dataset: name of the data set.
        dataset_revision: its revision.
        seed: seed of the run.
        n: number of requested samples.
        shape: (C,H,W) of an image.
        class_names: names of the classes.
        sample_ids: requested sample ids in the order drawn.
        cells: the cells with their rows, in plan order.
        cards: cards of the models, by name.
        versions: of the libraries.
        data: the data set's card; None in old run folders.
        note: text that every table of the run shows; "" for none.
        frechet_folders: run folders with its Fréchet distances, where not `folder`.
        options, given: see `RunFile`.
    """

    folder: Path
    dataset: str
    dataset_revision: str
    seed: int
    n: int
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    sample_ids: tuple[int, ...]
    cells: list[CellResult]
    cards: dict[str, ModelCard]
    versions: dict[str, str]
    data: DatasetCard | None = None
    note: str = ""
    frechet_folders: tuple[Path, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """Texts that every table shows: the run's note, and that of its data set."""
        data = f"Data: {self.data.note}" if self.data and self.data.note else ""
        return tuple(note for note in (self.note, data) if note)
