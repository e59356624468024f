"""manifest.json of a bundle: its files with their hashes, and its claims. No torch here."""

import re
from typing import Annotated, Literal

from pydantic import Field

from robbench.core.schema import Strict
from robbench.specs import SHA256, Name

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
# Files of a bundle besides its manifest: a run folder, and the threat models of its attacks.
LAYOUT = re.compile(
    r"run\.yaml|originals\.npz"
    r"|(?:cards|threat_models)/[A-Za-z0-9][A-Za-z0-9._-]*\.yaml"
    r"|frechet/[0-9a-z]{1,16}-[0-9a-f]{8}\.json"
    r"|cells/[0-9a-f]{16}/(?:cell\.json|shard-[0-9]{4,9}-[0-9a-f]{8}\.parquet)"
)
Count = Annotated[int, Field(ge=0)]


class FileEntry(Strict):
    """A file of the bundle. size: bytes, uncompressed."""

    sha256: SHA256
    size: Count


class RunIdentity(Strict):
    """Identity of a run: two bundles are parts of one leaderboard when all of it agrees.

    Attributes:
        dataset: name of the data set.
        dataset_revision: its revision.
        split: the attacked split.
        seed: seed of the run.
        n: number of requested samples.
        samples_sha256: `frechet_records.samples_hash` of the requested sample ids.
        versions: of the libraries.
    """

    dataset: str
    dataset_revision: SHA256
    split: str
    seed: Count
    n: Count
    samples_sha256: SHA256
    versions: dict[str, str]


class ExampleShare(Strict):
    """The stored adversarial examples in the bundle.

    Attributes:
        asked: `--examples` as given: "0.1" for a share, "5" for a number per cell, "all", "none".
        seed: of the choice, which is made per cell.
        stored: number of examples that the run stores in all cells together.
        exported: number of those in the bundle.
        witnesses: number of exported examples that have a witness.
    """

    asked: str
    seed: int
    stored: Count
    exported: Count
    witnesses: Count


class BundleCell(Strict):
    """A cell of the plan in the bundle.

    Attributes:
        hash: its address.
        model: name of the model.
        attack: label of the attack.
        status: of the cell.
        rows: number of rows of requested samples.
        examples: number of those with an adversarial example.
    """

    hash: SHA256
    model: Name
    attack: str
    status: Literal["running", "ok", "failed"]
    rows: Count
    examples: Count

    @property
    def title(self) -> str:
        """ "digits-at x pgd20"."""
        return f"{self.model} x {self.attack}"


class Manifest(Strict):
    """manifest.json.

    Attributes:
        schema_version: of the manifest.
        kind: of file.
        versions: of robbench and the libraries that exported.
        run: identity of the run.
        partial: exported although cells failed or lack rows (those have another status than "ok").
        examples: the adversarial examples in it.
        models: sha256 of the weights, by name of the model.
        detectors: sha256 of the weights of the detectors of guarded models, by name; none in old bundles.
        flows: sha256 of the weights of the flows that attacks or likelihoods used, by name.
        cells: the cells, in plan order.
        tables: digests of the derived tables (`export.table_digests`), by name.
        files: every file but manifest.json, by its name in the bundle.
    """

    schema_version: Literal[1] = 1
    kind: Literal["robbench bundle"] = "robbench bundle"
    versions: dict[str, str]
    run: RunIdentity
    partial: bool
    examples: ExampleShare
    models: dict[str, SHA256]
    detectors: dict[str, SHA256] = Field(default_factory=dict)
    flows: dict[str, SHA256]
    cells: tuple[BundleCell, ...]
    tables: dict[str, SHA256]
    files: dict[str, FileEntry]
