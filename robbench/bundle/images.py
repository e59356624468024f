"""Checks of stored adversarial examples: box, ball, distances, witnesses. Needs no classifier."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from robbench.attacks import Attack, Victim, build_attack
from robbench.attacks.checks import check_tensor, inside_ball, inside_box
from robbench.attacks.generated_corruption import ALGORITHM as GENERATED
from robbench.attacks.generated_corruption import GeneratedCorruption
from robbench.attacks.likelihood import noise_images
from robbench.attacks.search.geometry import SampleNoise, norm_of
from robbench.attacks.search.task import Samples
from robbench.attacks.victim import chunks
from robbench.attacks.witness import BadWitnessError, Witness
from robbench.bundle.consistency import ROUNDING
from robbench.bundle.findings import WHOLE, Finding, judge
from robbench.core.errors import AttackViolation, UserError
from robbench.data import Dataset, sample_ids
from robbench.models.flows.base import FrozenFlow
from robbench.specs import Norm
from robbench.store.columns import Images, decode_images
from robbench.store.ledger import Ledger
from robbench.store.records import CellRecord, CellResult, Run

BALL, SAMPLES, ORIGINALS = "ball", "samples", "originals"
NORMS: tuple[Norm, ...] = ("l1", "l2", "linf", "l0")
Flows = Callable[[CellRecord], FrozenFlow | None]


@dataclass(frozen=True)
class CleanImages:
    """Source of clean images: the verifier's data set, or the bundle's own copies. reason: why the latter, else ""."""

    run: Run
    dataset: Dataset | None
    originals: Mapping[int, Images]
    reason: str = ""

    @property
    def weaker(self) -> bool:
        """Whether the images are the bundle's own."""
        return self.dataset is None

    def has(self, ids: Sequence[int]) -> list[bool]:
        """Whether each sample's image is known."""
        known = self.originals if self.dataset is None else set(self.dataset.test.ids.tolist())
        return [i in known for i in ids]

    def of(self, ids: Sequence[int]) -> Tensor:
        """Images [n,C,H,W] in [0,1] of samples that it `has`."""
        if self.dataset is not None:
            return self.dataset.test.by_ids(list(ids))[0]
        return torch.from_numpy(np.stack([self.originals[i] for i in ids]))


def clean_images(run: Run, dataset: Dataset | None, reason: str = "") -> CleanImages:
    """The data set, where available and of the bundle's revision, else the bundle's own originals."""
    originals = Ledger(run.folder).originals()
    if dataset is not None and dataset.revision != run.dataset_revision:
        dataset, reason = None, "the data set here has another revision"
    return CleanImages(run, dataset, originals, reason)


def data_findings(run: Run, source: CleanImages, given: Dataset | None) -> Iterator[Finding]:
    """Findings on data revision, the seeded subset, labels, and the bundle's copies of clean images."""
    if given is not None and source.dataset is None:
        problem = f"revision {run.dataset_revision[:12]} in the bundle, {given.revision[:12]} here"
        yield judge(WHOLE, "", SAMPLES, run.n, [problem])
    elif source.dataset is None:
        yield Finding(WHOLE, "", SAMPLES, "weaker", 0, f"not compared with the data set: {source.reason}")
    else:
        yield judge(WHOLE, "", SAMPLES, run.n, list(_sample_problems(run, source.dataset)))
    if source.originals:
        yield _originals_finding(source)


def _sample_problems(run: Run, dataset: Dataset) -> Iterator[str]:
    if run.class_names != dataset.class_names or run.shape != dataset.shape:
        yield "classes or image shape are not the data set's"
    if run.data is not None and run.data.like != dataset.like:
        yield f"the data set is said to be like {run.data.like}, here it is like {dataset.like}"
    if not 0 < run.n <= len(dataset.test):
        yield f"{run.n} samples of a test set of {len(dataset.test)}"
        return
    drawn = sample_ids(dataset.test, run.n, run.seed)
    if foreign := len(set(run.sample_ids) - set(drawn)):
        yield f"{foreign} of {run.n} sample ids are not those that seed {run.seed} draws"
    labels = dict(zip(dataset.test.ids.tolist(), dataset.test.labels.tolist(), strict=True))
    for result in run.cells:
        rows = result.rows
        wrong = rows["sample_id"].map(labels).to_numpy() != rows["label"].to_numpy()
        if wrong.any():
            first = int(rows["sample_id"].to_numpy()[wrong][0])
            title = f"{result.cell.model} x {result.cell.attack.label}"
            yield f"{title}: {int(wrong.sum())} labels are not the data set's (first sample {first})"


def _originals_finding(source: CleanImages) -> Finding:
    ids = sorted(source.originals)
    own = np.stack([source.originals[i] for i in ids])
    outside = ~((own >= 0) & (own <= 1)).reshape(len(ids), -1).all(1)
    problems = [f"{int(outside.sum())} images leave [0,1]"] if outside.any() else []
    if source.dataset is None:
        finding = judge(WHOLE, "", ORIGINALS, len(ids), problems)
        return finding if problems else Finding(WHOLE, "", ORIGINALS, "weaker", len(ids), source.reason)
    known = set(source.dataset.test.ids.tolist())
    shared = [i for i in ids if i in known]
    true = source.of(shared).numpy() if shared else own[:0]
    other = [
        i for i, image in zip(shared, true, strict=True) if not np.array_equal(image, source.originals[i])
    ]
    if strangers := len(ids) - len(shared):
        problems.append(f"{strangers} ids are not in the test set")
    if other:
        problems.append(f"{len(other)} images are not the data set's (first sample {other[0]})")
    return judge(WHOLE, "", ORIGINALS, len(ids), problems)


@dataclass(frozen=True)
class Stored:
    """Stored examples of a cell: rows of the ledger, adversarial and clean images [n,C,H,W] in their order. problems:
    on rows that were left out because their image cannot be read."""

    rows: pd.DataFrame
    adversarial: Tensor
    clean: Tensor
    problems: tuple[str, ...]

    @property
    def ids(self) -> list[int]:
        """Sample ids."""
        return [int(i) for i in self.rows["sample_id"]]

    @property
    def labels(self) -> Tensor:
        """Labels [n] int64."""
        return torch.tensor(self.rows["label"].to_numpy(), dtype=torch.int64)


def stored_examples(run: Run, result: CellResult, source: CleanImages) -> Stored:
    """The stored examples of a cell with their clean images, which for attacks on a flow depend on its settings."""
    rows = result.rows[result.rows["example"].notna()]
    size = 4 * int(np.prod(run.shape))
    readable = rows["example"].map(len) == size
    known = np.array(source.has([int(i) for i in rows["sample_id"]]), dtype=np.bool_)
    problems = (
        [f"{int((~readable).sum())} examples are no image of shape {run.shape}"] if not readable.all() else []
    )
    if not known.all():
        problems.append(f"{int((~known).sum())} examples have no clean image")
    rows = rows[readable.to_numpy(dtype=np.bool_) & known]
    clean = _clean(run, result.cell, rows, source)
    return Stored(rows, pixels(rows["example"], run.shape), clean, tuple(problems))


def pixels(column: "pd.Series[bytes]", shape: tuple[int, int, int]) -> Tensor:
    """Images [n,C,H,W] of a column of bytes."""
    return torch.from_numpy(decode_images(list(column), shape))


def _clean(run: Run, cell: CellRecord, rows: pd.DataFrame, source: CleanImages) -> Tensor:
    ids = [int(i) for i in rows["sample_id"]]
    if not ids:
        return torch.zeros((0, *run.shape))
    if cell.attack.target == "flow" and cell.attack.parameters.get("images") == "noise":
        return noise_images(run.seed, torch.tensor(ids), run.shape, _grey_levels(run, source))
    return source.of(ids)


def _grey_levels(run: Run, source: CleanImages) -> int:
    if source.dataset is not None:
        return source.dataset.grey_levels
    levels = run.data.grey_levels if run.data is not None else None
    return levels or run.cards[run.cells[0].cell.model].grey_levels or 256


def image_findings(run: Run, source: CleanImages, flows: Flows) -> Iterator[Finding]:
    """One finding per cell with stored examples. flows: returns the flow of a cell's attack, None if unavailable."""
    for result in run.cells:
        stored = stored_examples(run, result, source)
        if not len(stored.rows) and not stored.problems:
            continue
        problems = [*stored.problems, *_problems(run, result.cell, stored)]
        name, label, count = result.cell.model, result.cell.attack.label, len(stored.rows)
        yield judge(name, label, BALL, count, problems)
        if not problems and count:
            yield from _strength(run, result, stored, source, flows(result.cell))


def _strength(
    run: Run, result: CellResult, stored: Stored, source: CleanImages, flow: FrozenFlow | None
) -> Iterator[Finding]:
    """Further findings: on witnesses, and a weaker one where clean images are the bundle's own."""
    name, label = result.cell.model, result.cell.attack.label
    if result.cell.attack.needs_witness:
        yield _witness_finding(run, result.cell, stored, flow)
    if source.weaker:
        yield Finding(name, label, BALL, "weaker", len(stored.rows), "against the bundle's own clean images")


def _problems(run: Run, cell: CellRecord, stored: Stored) -> Iterator[str]:
    ids, attack = torch.tensor(stored.ids, dtype=torch.int64), cell.attack
    if not len(ids):
        return
    try:
        check_tensor(attack, stored.adversarial, stored.clean, ids)
        inside_box(attack, ids, stored.adversarial)
        if attack.space == "image":
            inside_ball(attack, ids, stored.clean, stored.adversarial)
    except AttackViolation as error:
        yield str(error)
        return
    if attack.algorithm == GENERATED:
        yield from _other_corruptions(run, cell, stored, ids)
    difference = stored.adversarial - stored.clean
    for norm in (norm for norm in NORMS if norm in stored.rows and stored.rows[norm].notna().all()):
        true, said = norm_of(difference, norm).numpy(), stored.rows[norm].to_numpy(dtype=np.float64)
        wrong = ~(np.abs(true - said) <= ROUNDING * true + 1e-6)
        if wrong.any():
            first = stored.ids[int(wrong.argmax())]
            yield f"{int(wrong.sum())} of {len(ids)} rows state another {norm} than their example has (first {first})"
    if "original" in stored.rows:
        yield from _other_originals(run, stored)


def _other_corruptions(run: Run, cell: CellRecord, stored: Stored, ids: Tensor) -> Iterator[str]:
    """Problems of images that follow from the clean ones and the seed."""
    if not ((stored.clean >= 0) & (stored.clean <= 1)).all():
        yield "clean images leave [0,1], and no corrupted ones follow from them"
        return
    try:
        attack = GeneratedCorruption(cell.attack)
        attack.require_images(run.shape)
    except UserError as error:
        yield str(error)
        return
    yield from attack.differences(Samples(ids, stored.clean, stored.labels), stored.adversarial, run.seed)


def _other_originals(run: Run, stored: Stored) -> Iterator[str]:
    """Problems of the attacked images of a flow's cell, which must be test images, or noise made from the seed."""
    missing = stored.rows["original"].isna() | (
        stored.rows["original"].map(_length) != 4 * int(np.prod(run.shape))
    )
    if missing.any():
        yield f"{int(missing.sum())} examples have no readable original"
        return
    other = (pixels(stored.rows["original"], run.shape) != stored.clean).flatten(1).any(1)
    if other.any():
        first = stored.ids[int(other.int().argmax())]
        yield f"{int(other.sum())} attacked images are not those of their seed and data set (first sample {first})"


def _length(content: object) -> int:
    return len(content) if isinstance(content, bytes) else -1


def _witness_finding(run: Run, cell: CellRecord, stored: Stored, flow: FrozenFlow | None) -> Finding:
    name, label, check = cell.model, cell.attack.label, "witness"
    moved = (stored.adversarial != stored.clean).flatten(1).any(1).numpy()
    absent = stored.rows["witness"].isna().to_numpy(dtype=np.bool_)
    if (absent & moved).any() and absent.all():
        reason = "no witnesses are stored (runs before ledger schema 2 have none); run these cells again"
        return Finding(name, label, check, "unchecked", 0, reason)
    if (absent & moved).any():
        count = int((absent & moved).sum())
        return judge(name, label, check, len(absent), [f"{count} examples lack the witness that others have"])
    if flow is None and cell.attack.needs_flow:
        reason = f"flow {cell.flow} is not at hand; name it with --model CARD"
        return Finding(name, label, check, "unchecked", 0, reason)
    problems = list(_witness_problems(run, cell, stored, absent, flow))
    return judge(name, label, check, int((~absent).sum()), problems)


def _witness_problems(
    run: Run, cell: CellRecord, stored: Stored, absent: np.ndarray, flow: FrozenFlow | None
) -> Iterator[str]:
    rows = np.flatnonzero(~absent)
    device = torch.device("cpu") if flow is None else next(flow.buffers()).device
    try:
        attack = build_attack(cell.attack, flow)
        read = [Witness.from_bytes(content) for content in stored.rows["witness"].iloc[rows]]
        yield from _identity_problems(cell, stored.labels[rows].tolist(), read)
        if not len(rows):
            return
        tensors = _stack(read, _shapes(attack, stored, device))
    except (BadWitnessError, UserError) as error:
        yield f"a witness {error}" if isinstance(error, BadWitnessError) else str(error)
        return
    samples = Samples(
        torch.tensor(stored.ids, dtype=torch.int64)[rows], stored.clean[rows], stored.labels[rows]
    )
    victim, every = Victim(nn.Identity(), device), torch.ones(len(rows), dtype=torch.bool)
    try:
        for part in chunks(torch.arange(len(rows)), victim.batch_size):
            if attack.flow is not None:  # it must get the clean images back
                attack.flow.encode_flat(samples.x[part].to(device), samples.y[part].to(device))
        attack.check_witness(victim, samples, stored.adversarial[rows], tensors, every, run.seed)
    except (AttackViolation, UserError) as error:  # another image, or a flow that does not invert itself
        yield str(error)


def _identity_problems(cell: CellRecord, labels: Sequence[int], read: Sequence[Witness]) -> Iterator[str]:
    own = cell.attack_flow.sha256 if cell.attack_flow is not None else ""
    if count := sum(witness.flow != own for witness in read):
        yield f"{count} witnesses are of another flow than the cell's"
    if count := sum(one.condition != label for one, label in zip(read, labels, strict=True)):
        yield f"{count} witnesses have another condition than the label"


def _shapes(attack: Attack, stored: Stored, device: torch.device) -> dict[str, tuple[int, ...]]:
    """The shape of each perturbation of one sample, by name."""
    space = attack.space()
    if space is None:
        raise BadWitnessError("stands beside an attack that has none")
    noise = SampleNoise(0, "shape", torch.tensor(stored.ids[:1]), 0, device)
    state = space.start(stored.clean[:1].to(device), stored.labels[:1].to(device), noise)
    return {name: tuple(state[name].shape[1:]) for name in space.perturbations}


def _stack(read: Sequence[Witness], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Perturbations as tensors [n,...]; `BadWitnessError` for other names, shapes, or numbers that are not finite."""
    for witness in read:
        if witness.perturbations.keys() != shapes.keys():
            raise BadWitnessError(
                f"holds {', '.join(sorted(witness.perturbations))}, not {', '.join(sorted(shapes))}"
            )
        for name, value in witness.perturbations.items():
            if value.shape != shapes[name] or not np.isfinite(value).all():
                raise BadWitnessError(f"has a {name} of shape {value.shape}, or one that is not finite")
    return {
        name: torch.from_numpy(np.stack([witness.perturbations[name] for witness in read]).astype(np.float32))
        for name in sorted(shapes)
    }
