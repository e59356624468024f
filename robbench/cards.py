"""Schemas of a model's card. An unknown key is an error that names the file and the key. No torch here."""

from typing import Annotated, Any, Literal

from pydantic import Field

from robbench.schema import Strict, canonical_hash
from robbench.specs import SHA256, ModelKind, Name

Side = Annotated[int, Field(gt=0)]


class Weights(Strict):
    """A weights file beside the card (or where a URL says), pinned by its sha256."""

    file: str
    sha256: SHA256


class Golden(Strict):
    """Recorded inputs and outputs: loading the model must reproduce them within `tolerance` (absolute)."""

    file: str
    sha256: SHA256
    tolerance: float = Field(ge=0, allow_inf_nan=False)


class Architecture(Strict):
    """A builder of the model registry and its keyword arguments."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class FlowReference(Strict):
    """The flow a defense trained with."""

    name: str
    sha256: SHA256


class Training(Strict):
    """How the weights came to be: enough to train them again."""

    command: str
    seed: int
    recipe: str
    parameters: dict[str, Any]
    train_samples: int
    validation_samples: int
    epochs: int
    selected_epoch: int
    selection: str
    flow: FlowReference | None = None
    versions: dict[str, str]
    minutes: float
    note: str = ""


class Measurement(Strict):
    """One number in a card with everything needed to believe it."""

    metric: str
    value: float
    unit: str
    split: str
    n: int
    lower: float | None = None
    upper: float | None = None
    command: str
    note: str = ""


class ModelCard(Strict):
    """zoo/NAME/card.yaml."""

    schema_version: Literal[1] = 1
    name: Name
    kind: ModelKind
    description: str
    dataset: str
    defense: str
    architecture: Architecture
    input_shape: tuple[Side, Side, Side]
    classes: int | None = Field(default=None, ge=2)
    grey_levels: int | None = Field(default=None, ge=2)
    weights: Weights
    golden: Golden | None = None
    training: Training | None = None
    measurements: tuple[Measurement, ...] = ()
    license: str = "MIT"
    source: str = ""

    @property
    def function_hash(self) -> str:
        """Hash of what the model computes: weights, architecture and its arguments, shapes, classes, grey levels.

        The weights' sha256 alone is not enough: a flow's scale floor, for one, changes the function and no tensor.
        """
        parts = self.model_dump(
            mode="json", include={"architecture", "input_shape", "classes", "grey_levels"}
        )
        return canonical_hash({**parts, "weights": self.weights.sha256})
