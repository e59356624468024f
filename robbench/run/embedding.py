"""Where a classifier puts clean and attacked images: two coordinates of each image's embedding.

The embedding is what `encoder` returns, or goes into the last linear layer where the classifier has no encoder. Of two
dimensions it is shown as it is, of more by the two principal components (scikit-learn) of the clean images' embeddings.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.attacks.victim import chunks
from robbench.core.counting import count_noun
from robbench.core.errors import UserError, known_name
from robbench.detectors.features import last_hidden_layer, read_layers
from robbench.models.embedding import EmbeddingClassifier
from robbench.run.subjects import FigureRequest, Numbers, Subject
from robbench.store.figure_records import Cell
from robbench.store.records import CellResult

COLUMNS = ("images", "sample_id", "label", "prediction", "x", "y")
CLEAN = "clean"
LEAST = 3  # images whose components are computed
Points = NDArray[np.float64]


def embed(subject: Subject, request: FigureRequest) -> Numbers:
    """Two coordinates of the stored clean images and of the attacked ones that the run keeps of them."""
    if len(subject.ids) < LEAST:
        raise UserError(
            f"{count_noun(len(subject.ids), 'stored image')}, and an embedding is shown of at least {LEAST}; run it "
            f"again with a larger --keep-examples, then robbench figure"
        )
    layer = _layer(subject)
    clean, predicted = _read(subject, layer, subject.images)
    project, how = projection(clean)
    labels = dict(zip(subject.ids, subject.labels.tolist(), strict=True))
    rows = _rows(CLEAN, list(subject.ids), labels, predicted, project(clean))
    for cell in _cells(subject, request):
        kept = subject.attacked(cell)
        if kept:
            found, predicted = _read(subject, layer, torch.stack(list(kept.values())))
            rows += _rows(cell.cell.attack.label, list(kept), labels, predicted, project(found))
    facts = (f"Output of layer {layer}, {clean.shape[1]} dimensions; {how}.",)
    attacks = tuple(word for label in request.attacks for word in ("--attacks", label))
    return Numbers(COLUMNS, tuple(rows), facts, len(subject.ids), attacks)


def _cells(subject: Subject, request: FigureRequest) -> list[CellResult]:
    by_label = {result.cell.attack.label: result for result in subject.cells}
    step = "or leave --attacks out"
    names = [known_name("attack", name, by_label, step) for name in request.attacks] or list(by_label)
    return [by_label[name] for name in names]


def _layer(subject: Subject) -> str:
    if isinstance(subject.victim.module, EmbeddingClassifier):
        return "encoder"
    return last_hidden_layer(subject.victim.module, subject.images[:2].to(subject.victim.device))


def _read(subject: Subject, layer: str, images: Tensor) -> tuple[Points, list[int]]:
    """Embeddings [N,D] and predicted classes [N]."""
    features, logits = [], []
    with torch.no_grad():
        for part in chunks(images, subject.victim.batch_size):
            (found,), out = read_layers(subject.victim.module, [layer], part.to(subject.victim.device))
            features.append(found.cpu())
            logits.append(out.cpu())
    values = torch.cat(features).numpy()
    if not np.isfinite(values).all():
        raise UserError(f"layer {layer!r} gives numbers that are not finite; no embedding can be drawn")
    return values, torch.cat(logits).argmax(1).tolist()


def projection(clean: Points) -> "tuple[Projection, str]":
    """From embeddings [N,D] to two coordinates [N,2], and how it is done in words. clean: what it is fitted to."""
    dimensions = clean.shape[1]
    if dimensions <= 2:
        return Projection(np.zeros(dimensions), np.eye(dimensions, 2)), "shown as they are"
    from sklearn.decomposition import PCA

    with np.errstate(divide="ignore", invalid="ignore"):  # equal embeddings have no variance
        fitted = PCA(2, svd_solver="full").fit(clean)
    share = float(np.nan_to_num(fitted.explained_variance_ratio_.sum()))
    words = (
        f"shown by the two principal components of the clean images, {100 * share:.1f} % of their variance"
    )
    return Projection(fitted.mean_, fitted.components_.T), words


class Projection:
    """(points - mean) directions, [N,D] to [N,2]."""

    def __init__(self, mean: Points, directions: Points) -> None:
        self.mean, self.directions = mean, directions

    def __call__(self, points: Points) -> Points:
        found: Points = (points - self.mean) @ self.directions
        return found


def _rows(
    images: str, ids: list[int], labels: dict[int, int], predicted: list[int], points: Points
) -> list[tuple[Cell, ...]]:
    return [
        (images, i, labels[i], prediction, float(x), float(y))
        for i, prediction, (x, y) in zip(ids, predicted, points, strict=True)
    ]
