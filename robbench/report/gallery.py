"""Images of a run as inline PNGs: of a classifier original, adversarial and magnified difference; of a flow the images
that were attacked and what became of them, each with its bits/dim."""

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from robbench.metrics.verdicts import clean_correct
from robbench.results.likelihood import Role, bits_text, role, steps_of
from robbench.results.rows import complete
from robbench.store.records import CellResult, Run

Pixels = NDArray[np.float32]
Originals = Callable[[Sequence[int]], np.ndarray]

TRIPLES = 6
STRIP_SAMPLES = 4
_GROUPS: tuple[tuple[str, tuple[Role, ...]], ...] = (
    ("test images", ("in", "noise")),
    ("uniform-noise images", ("out",)),
)
SHOWN_SIDE = 128  # pixels of the longer side of a shown image, at least
FACTORS = (1, 2, 5, 10, 20, 50, 100)
NO_ORIGINALS = (
    "No images: the ledger stores adversarial images only, and this page was written without the clean "
    "images of the data set. Write the report again where the data set is at hand."
)
NO_EXAMPLES = "No images: the run stored no adversarial examples of this model."


@dataclass(frozen=True)
class Triple:
    """One adversarial example as a page shows it.

    Attributes:
        sample_id: of the test image.
        attack: label of the attack.
        label: name of the true class.
        clean_prediction: name of the class predicted before the attack.
        prediction: name of the class predicted after it.
        robust: whether the model is right after it.
        clean_margin: logit of the label minus the largest other, before.
        margin: the same, after.
        l2: size of the perturbation, pixels in [0, 1].
        linf: the same in the Linf norm.
        factor: magnifies the difference.
        original: image before the attack, a data URI as the next two.
        adversarial: image after it.
        difference: of the two, around grey.
    """

    sample_id: int
    attack: str
    label: str
    clean_prediction: str
    prediction: str
    robust: bool
    clean_margin: float
    margin: float
    l2: float
    linf: float
    factor: int
    original: str
    adversarial: str
    difference: str


def triples(
    run: Run,
    results: Sequence[CellResult],
    originals: Originals,
    limit: int = TRIPLES,
    side: int = SHOWN_SIDE,
    order: Mapping[int, int] | None = None,
) -> list[Triple]:
    """Up to `limit` stored examples of one model, attack by attack in turn, broken samples first, of these by `order`
    (place by sample id) or else by sample id.

    originals: clean images [n,C,H,W] in [0,1] for sample ids; ValueError when it returns another shape. side: as in
    `data_uri`.
    """
    return load_triples(run, _choose(complete(run, results), limit, order or {}), originals, side)


def load_triples(
    run: Run,
    chosen: "Sequence[tuple[CellResult, pd.Series[float]]]",
    originals: Originals,
    side: int = SHOWN_SIDE,
) -> list[Triple]:
    """The stored examples of chosen rows of cells, with their originals."""
    if not chosen:
        return []
    ids = [int(row["sample_id"]) for _, row in chosen]
    clean = np.asarray(originals(ids), dtype=np.float32)
    if clean.shape != (len(ids), *run.shape):
        raise ValueError(
            f"originals returned {clean.shape} for {len(ids)} ids; need {(len(ids), *run.shape)}"
        )
    return [_triple(run, result, row, x, side) for (result, row), x in zip(chosen, clean, strict=True)]


def _choose(
    results: Sequence[CellResult], limit: int, order: Mapping[int, int]
) -> "list[tuple[CellResult, pd.Series[float]]]":
    """Rows with an example, one attack after the other until `limit`."""
    queues = [_candidates(result, order) for result in results]
    chosen: list[tuple[CellResult, pd.Series[float]]] = []
    while queues and len(chosen) < limit:
        queue = queues.pop(0)
        found = next(queue, None)
        if found is not None:
            chosen.append(found)
            queues.append(queue)
    return sorted(chosen, key=lambda pair: results.index(pair[0]))


def _candidates(
    result: CellResult, order: Mapping[int, int]
) -> "Iterator[tuple[CellResult, pd.Series[float]]]":
    """Attacked samples with a stored example: broken ones, then those that held."""
    rows = result.rows
    kept = rows[rows["example"].notna() & clean_correct(rows)]
    placed = kept.assign(place=[order.get(int(i), len(order)) for i in kept["sample_id"]])
    for _, row in placed.sort_values(["robust", "place", "sample_id"], kind="stable").iterrows():
        yield result, row


def sort_by_dispute(results: Sequence[CellResult]) -> list[int]:
    """Ids of the samples with images, first those of which about half of `results` on classifiers are broken."""
    held: dict[int, list[bool]] = {}
    for result in (r for r in results if r.cell.decides):
        kept = result.rows[result.rows["example"].notna() & clean_correct(result.rows)]
        for i, is_robust in zip(kept["sample_id"], kept["robust"], strict=True):
            held.setdefault(int(i), []).append(bool(is_robust))
    return sorted(held, key=lambda i: (abs(2 * sum(held[i]) / len(held[i]) - 1), i))


def places(ids: Sequence[int], turn: int) -> dict[int, int]:
    """Place of each of `ids` when one begins with the `turn`-th and goes round: every page shows others first."""
    return {i: (place - turn) % len(ids) for place, i in enumerate(ids)}


def _triple(run: Run, result: CellResult, row: "pd.Series[float]", clean: Pixels, side: int) -> Triple:
    adversarial = np.frombuffer(bytes(row["example"]), dtype="<f4").reshape(run.shape)  # type: ignore[call-overload]
    difference = adversarial - clean
    factor = magnification(float(np.abs(difference).max()))
    return Triple(
        sample_id=int(row["sample_id"]),
        attack=result.cell.attack.label,
        label=_class_name(run, int(row["label"])),
        clean_prediction=_class_name(run, int(row["clean_prediction"])),
        prediction=_class_name(run, int(row["prediction"])),
        robust=bool(row["robust"]),
        clean_margin=float(row["clean_margin"]),
        margin=float(row["margin"]),
        l2=float(row["l2"]),
        linf=float(row["linf"]),
        factor=factor,
        original=data_uri(clean, side),
        adversarial=data_uri(adversarial, side),
        difference=data_uri(0.5 + 0.5 * factor * difference, side),
    )


def _class_name(run: Run, index: int) -> str:
    if index == -1:
        return "none (logits not finite)"
    return run.class_names[index] if 0 <= index < len(run.class_names) else str(index)


@dataclass(frozen=True)
class Shot:
    """One image (data URI) of a sample and its bits/dim."""

    sample_id: int
    uri: str
    bits: str


@dataclass(frozen=True)
class Strip:
    """One kind of image over the same samples, in the same order. name: "test images", "nll-in@32"."""

    name: str
    about: str
    shots: tuple[Shot, ...]


def strips(run: Run, results: Sequence[CellResult], limit: int = STRIP_SAMPLES) -> list[Strip]:
    """Rows of a flow's gallery over up to `limit` samples: test images, in-distribution attack and noise of the same
    size, uniform-noise images, out-of-distribution attack. Of each attack the largest budget with images is shown."""
    cells = _strongest(complete(run, results))
    kept = {key: _select_rows(result) for key, result in cells.items()}
    ids = sorted(set.intersection(*[set(rows.index) for rows in kept.values()]))[:limit] if kept else []
    if not ids:
        return []
    found: list[Strip] = []
    for original, keys in _GROUPS:
        present = [key for key in keys if key in kept]
        if present:
            found.append(_strip(run, kept[present[0]].loc[ids], "original", original, "before any attack"))
        for key in present:
            attack = cells[key].cell.attack
            about = f"epsilon {attack.epsilon:g} of {attack.pixel_range}"
            found.append(_strip(run, kept[key].loc[ids], "example", attack.label, about))
    return found


def _strongest(results: Sequence[CellResult]) -> dict[Role, CellResult]:
    """The cell with images of the largest epsilon, then the most steps, a role; noise of the size of the attack."""
    with_images = [r for r in sorted(results, key=_strength) if r.rows["example"].notna().any()]
    found = {role(result.cell.attack): result for result in with_images}
    if "in" not in found:
        return found
    size = _strength(found["in"])[0]
    noise = [r for r in with_images if role(r.cell.attack) == "noise" and _strength(r)[0] == size]
    return {key: r for key, r in found.items() if key != "noise"} | ({"noise": noise[0]} if noise else {})


def _strength(result: CellResult) -> tuple[float, int]:
    attack = result.cell.attack
    return attack.epsilon or 0.0, steps_of(attack) or 0


def _select_rows(result: CellResult) -> pd.DataFrame:
    rows = result.rows
    return rows[rows["example"].notna() & rows["original"].notna()].set_index("sample_id")


def _strip(run: Run, rows: pd.DataFrame, column: str, name: str, about: str) -> Strip:
    score = "nll_before" if column == "original" else "nll_after"
    images = [np.frombuffer(bytes(stored), dtype="<f4").reshape(run.shape) for stored in rows[column]]
    shots = [
        Shot(int(i), data_uri(image), bits_text(float(bits)))
        for i, image, bits in zip(rows.index, images, rows[score], strict=True)
    ]
    return Strip(name, about, tuple(shots))


def magnification(largest: float) -> int:
    """The largest of FACTORS that keeps 0.5 + factor / 2 * difference inside [0, 1]; grey means no change."""
    return max((factor for factor in FACTORS if factor * largest <= 1), default=1)


def data_uri(image: Pixels, side: int = SHOWN_SIDE) -> str:
    """An image [C,H,W] in [0,1] as a PNG data URI, scaled up by whole pixels to at least `side`; three channels are
    RGB, any other number is shown as the mean grey."""
    levels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    channels, height, width = levels.shape
    if channels == 3:
        picture = Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
    else:
        picture = Image.fromarray(np.rint(levels.mean(axis=0)).astype(np.uint8))
    scale = max(1, math.ceil(side / max(height, width)))
    stream = io.BytesIO()
    picture.resize((width * scale, height * scale), Image.Resampling.NEAREST).save(
        stream, "PNG", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
