"""Schemas of a model's card. An unknown key is an error that names the file and the key. No torch here."""

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from robbench.core.schema import Strict, canonical_hash
from robbench.specs import SHA256, ModelKind, Name

Side = Annotated[int, Field(gt=0)]
Url = Annotated[str, Field(pattern=r"^(https?|file)://\S+$")]
WeightsFormat = Literal["safetensors", "state-dict"]
FileName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f]+$")]
Real = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Weights(Strict):
    """A weights file, pinned by its sha256: beside the card, in the folder of checkpoints, or at a URL.

    urls: where it can be downloaded; the first that works is taken, the others are mirrors. format: safetensors, or
    "state-dict", what torch.save wrote (read with weights_only=True); left out, the name of the file tells. key: the
    entry of such a checkpoint that holds the state dict ("a.b": entry b of entry a, "a.0": the first of a list).
    prefix: what every name in the state dict begins with; it is removed.
    """

    file: FileName
    sha256: SHA256
    urls: tuple[Url, ...] = ()
    format: WeightsFormat = "safetensors"
    key: str | None = Field(default=None, min_length=1)
    prefix: str = ""

    @model_validator(mode="before")
    @classmethod
    def _format_of_the_file(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "format" in values:
            return values
        safe = str(values.get("file", "")).endswith(".safetensors")
        return {**values, "format": "safetensors" if safe else "state-dict"}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        path = PurePath(self.file)
        if self.urls and (path.is_absolute() or ".." in path.parts):
            raise ValueError("with urls, file is a relative path without '..': the place in the cache")
        if self.key is not None and self.format == "safetensors":
            raise ValueError(
                "a safetensors file has no entries to choose from; remove key, or where torch.save wrote the file, "
                "write `format: state-dict`"
            )
        return self


class Preprocessing(Strict):
    """(x - mean) / std a channel, for x in [0,1]: part of the model, so that attacks see images in [0,1]."""

    mean: tuple[Real, ...] = Field(min_length=1)
    std: tuple[Positive, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} values, std {len(self.std)}; give one each a channel"
            )
        return self


class Golden(Strict):
    """Recorded inputs and outputs: loading the model must reproduce them within `tolerance` (absolute)."""

    file: FileName
    sha256: SHA256
    tolerance: float = Field(ge=0, allow_inf_nan=False)


class Architecture(Strict):
    """What builds the module, and its keyword arguments.

    name: a name of the model registry; "module:callable", a callable in an importable Python module or in a file beside
    a card that the user names; "folder/file.py:callable", in a file whose path is relative to the card;
    "torchvision:NAME", "timm:NAME", "robustbench:NAME". sha256: of the source of such code (`robbench.models.code`).
    """

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    sha256: SHA256 | None = None

    @model_serializer(mode="wrap")
    def _without_absent_source(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if (key, value) != ("sha256", None)}

    @property
    def identity(self) -> dict[str, Any]:
        """What the module depends on: of code with a pinned source not where the file lies."""
        module, _, attribute = self.name.rpartition(":")
        name = (
            self.name
            if self.sha256 is None
            else f"{module.rpartition('/')[2].removesuffix('.py')}:{attribute}"
        )
        return {**self.model_dump(mode="json"), "name": name}


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
    preprocessing: Preprocessing | None = None
    weights: Weights
    golden: Golden | None = None
    training: Training | None = None
    measurements: tuple[Measurement, ...] = ()
    license: str = "MIT"
    source: str = ""

    @model_validator(mode="after")
    def _preprocessing_fits(self) -> Self:
        if self.preprocessing is None:
            return self
        if self.kind == "flow":
            raise ValueError("preprocessing is for classifiers: it would change a flow's density; remove it")
        values, channels = len(self.preprocessing.mean), self.input_shape[0]
        if values != channels:
            raise ValueError(f"preprocessing has {values} means, images have {channels} channels")
        return self

    @property
    def function_hash(self) -> str:
        """Hash of what the model computes: weights, architecture and its arguments, shapes, classes, grey levels, and
        where a card has them preprocessing and the part of the weights file that is read.

        The weights' sha256 alone is not enough: a flow's scale floor, for one, changes the function and no tensor.
        """
        parts = self.model_dump(mode="json", include={"input_shape", "classes", "grey_levels"})
        # What a card leaves out stays out of the hash too: results of cards written before there was such a key count.
        chosen = {
            "preprocessing": self.preprocessing and self.preprocessing.model_dump(mode="json"),
            "weights_key": self.weights.key,
            "weights_prefix": self.weights.prefix,
        }
        return canonical_hash(
            {
                **parts,
                "architecture": self.architecture.identity,
                **{key: value for key, value in chosen.items() if value},
                "weights": self.weights.sha256,
            }
        )
