"""The columns of the ledger, declared once; schemas, row writer and comparisons of rows follow from them.

A new column is one entry of `LEDGER_COLUMNS`, nullable and with the next schema version as `since`; `source` names the
attribute of an attack's outcome that it is written from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import pyarrow as pa

from robbench.specs import ModelKind

Images = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Kind = Literal["key", "class", "verdict", "step", "score", "loss", "distance", "count", "flag", "image"]


@dataclass(frozen=True)
class Column:
    """One column of the ledger.

    Attributes:
        name: in shards and in rows read back.
        type: Arrow type in shards.
        kind: how the same row of two runs is compared. "key" identifies the sample; "class" and "verdict" must be equal
            on any machine, a "step" on the same machine, "score" and "distance" up to rounding; "loss" follows from the
            logits and is not compared; "count" and "flag" describe the computation; "image" is bytes that only some
            samples keep, described by the other columns.
        source: attribute of the outcome that it is written from; "" for values computed besides the outcome.
        unit: of its values; "" where they have none.
        nullable: whether a row may lack it.
        since: version of the ledger's schema that added it; older shards are read with nulls.
        reference: its name in reference runs (`compare.samples`); "" where they leave it out.
    """

    name: str
    type: pa.DataType
    kind: Kind
    source: str = ""
    unit: str = ""
    nullable: bool = False
    since: int = 1
    reference: str = ""

    def __post_init__(self) -> None:
        if self.since > 1 and not self.nullable:
            raise ValueError(
                f"column {self.name!r} is newer than schema 1 and not nullable; older shards lack it"
            )


_INT, _FLOAT, _DOUBLE, _BOOL, _TEXT, _BYTES = (
    pa.int64(),
    pa.float32(),
    pa.float64(),
    pa.bool_(),
    pa.string(),
    pa.binary(),
)
_SAMPLE = (
    Column("sample_id", _INT, "key", "sample_ids", reference="sample_id"),
    Column("label", _INT, "class", "labels", unit="class", reference="label"),
)
_DISTANCES = tuple(Column(norm, _FLOAT, "distance", norm, "[0,1] pixels") for norm in ("l1", "l2", "linf"))
_CALLS = tuple(
    Column(name, _INT, "count", name, "model calls", reference=name) for name in ("forwards", "backwards")
)
_EXAMPLE = Column("example", _BYTES, "image", "adversarial", "[0,1] pixels", nullable=True)

_CLASSIFIER = (
    *_SAMPLE,
    Column("clean_prediction", _INT, "class", "clean_predictions", "class"),
    Column("prediction", _INT, "class", "predictions", "class"),
    Column("clean_margin", _FLOAT, "score", "clean_margins", "logits", reference="before"),
    Column("margin", _FLOAT, "score", "margins", "logits", reference="after"),
    Column("robust", _BOOL, "verdict", "robust", reference="robust"),
    Column("broken_by", _TEXT, "verdict", "broken_by", nullable=True, reference="broken_by"),
    Column("broken_at", _INT, "step", "broken_at", "steps", reference="step"),
    *_DISTANCES,
    Column("cross_entropy", _FLOAT, "loss", "cross_entropy", "nats"),
    Column("nll_before", _FLOAT, "score", unit="bits/dim", nullable=True),
    Column("nll_after", _FLOAT, "score", unit="bits/dim", nullable=True),
    *_CALLS,
    Column("counts_exact", _BOOL, "flag", "counts_exact"),
    _EXAMPLE,
    Column("witness", _BYTES, "image", nullable=True, since=2),
    Column("target", _INT, "class", "targets", "class", nullable=True, since=3),
    Column("reached", _BOOL, "verdict", "reached", nullable=True, since=3),
    Column("l0", _FLOAT, "distance", "l0", "values", nullable=True, since=3),
)
# Of a guarded classifier the margins are those of the pair: `clean_margin` is the smaller one of the classifier's and
# threshold - score, above 0 where an image is right and accepted; `margin` the larger one of the classifier's and
# score - threshold, above 0 where it is right or flagged.
_DETECTION = (
    *(
        Column(name, _DOUBLE, "score", unit="log-odds", nullable=True, since=4)
        for name in ("clean_score", "noisy_score", "score")
    ),
    Column("noisy_prediction", _INT, "class", unit="class", nullable=True, since=4),
    *(
        Column(f"{name}classifier_margin", _FLOAT, "score", unit="logits", nullable=True, since=4)
        for name in ("clean_", "noisy_", "")
    ),
)

LEDGER_COLUMNS: dict[ModelKind, tuple[Column, ...]] = {
    "classifier": _CLASSIFIER,
    "detector": (*_CLASSIFIER, *_DETECTION),
    "flow": (
        *_SAMPLE,
        Column("nll_before", _DOUBLE, "score", "nll_before", "bits/dim", reference="before"),
        Column("nll_after", _DOUBLE, "score", "nll_after", "bits/dim", reference="after"),
        *_DISTANCES,
        *_CALLS,
        Column("original", _BYTES, "image", "originals", "[0,1] pixels", nullable=True),
        _EXAMPLE,
    ),
}


def list_columns() -> tuple[Column, ...]:
    """Columns of classifiers, of guarded ones, then those of flows; a name may occur several times."""
    return tuple(chain.from_iterable(LEDGER_COLUMNS.values()))


def select_names(*kinds: Kind, target: ModelKind | None = None) -> tuple[str, ...]:
    """Names of the columns of these kinds, each once, in the order of the ledger; with `target` only those of cells on
    such models."""
    columns = list_columns() if target is None else LEDGER_COLUMNS[target]
    return tuple(dict.fromkeys(column.name for column in columns if column.kind in kinds))


def find_version() -> int:
    """Version of the schema in which shards are written: that of the newest column."""
    return max(column.since for column in list_columns())


def build_schema(target: ModelKind, version: int | None = None) -> pa.Schema:
    """Schema of the shards of cells on such models at `version`; None for the newest."""
    newest = find_version() if version is None else version
    return pa.schema(
        pa.field(column.name, column.type, column.nullable)
        for column in LEDGER_COLUMNS[target]
        if column.since <= newest
    )


def encode_image(image: Images) -> bytes:
    """The value of an image column for an image [C,H,W] in [0,1]."""
    return image.astype("<f4").tobytes()


def decode_images(values: Sequence[bytes], shape: tuple[int, int, int]) -> Images:
    """The images [n,C,H,W] of values of an image column."""
    return np.frombuffer(b"".join(values), "<f4").reshape(len(values), *shape).astype(np.float32)
