"""Witnesses as bytes: the perturbations, condition and flow from which an example is rendered again.

Whether a latent, joint or rendered example lies in its set cannot be checked from the image, only from its witness. The
bytes are a safetensors file of float32 arrays, without loss; the ledger compresses columns of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from robbench.attacks.base import Outcome
from robbench.core.schema import parse_json

FLOW, CONDITION = "flow", "condition"
Perturbations = Mapping[str, NDArray[np.float32]]


class BadWitnessError(ValueError):
    """Bytes that are not a witness; the message is the reason."""


@dataclass(frozen=True)
class Witness:
    """flow: sha256 of the flow's weights, "" where the renderer is no flow. condition: the label given to it.
    perturbations: by name, those of the attack's `SearchSpace`, whose `image_of` gives the image: "lambda" [D] in raw
    latent units; for a joint attack also "delta" [C,H,W] in [0,1] pixels; for rendered attacks "variables"."""

    flow: str
    condition: int
    perturbations: Perturbations

    def to_bytes(self) -> bytes:
        """The witness as bytes, the same for equal witnesses."""
        arrays = {name: np.ascontiguousarray(value, "<f4") for name, value in self.perturbations.items()}
        condition = np.array([self.condition], "<i8")
        return bytes(save({**dict(sorted(arrays.items())), CONDITION: condition}, {FLOW: self.flow}))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Witness":
        """The witness that `to_bytes` wrote; `BadWitnessError` for any other bytes."""
        try:
            arrays = load(content)
            length = int.from_bytes(content[:8], "little")
            flow = parse_json(content[8 : 8 + length])["__metadata__"][FLOW]
            condition = arrays.pop(CONDITION)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadWitnessError(f"is no witness ({' '.join(str(error).split())[:80]})") from error
        wrong = [name for name, value in arrays.items() if value.dtype != np.float32]
        if wrong or condition.shape != (1,) or condition.dtype != np.int64 or not arrays:
            raise BadWitnessError(f"is no witness ({', '.join(wrong) or CONDITION} of a wrong type or shape)")
        return cls(flow, int(condition[0]), arrays)


def witnesses(outcome: Outcome, flow: str | None, kept: frozenset[int]) -> list[bytes | None]:
    """Witnesses of an outcome's samples, in their order: None for samples that are not in `kept` or were not searched,
    and for all of an attack without witnesses. flow: sha256 of its weights; None where the renderer is no flow."""
    ids: list[int] = outcome.sample_ids.tolist()
    if not outcome.witness:
        return [None] * len(ids)
    arrays = {name: value.numpy() for name, value in outcome.witness.items()}
    labels: list[int] = outcome.labels.tolist()

    def witness(row: int) -> bytes | None:
        own = {name: value[row] for name, value in arrays.items()}
        unseen = outcome.broken_by[row] == "clean" and not any(value.any() for value in own.values())
        if ids[row] not in kept or unseen:
            return None
        return Witness(flow or "", labels[row], own).to_bytes()

    return [witness(row) for row in range(len(ids))]
