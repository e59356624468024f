"""Schemas of a model's card. An unknown key is an error that names the file and the key. No torch here."""

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from robbench.core.schema import Strict, canonical_hash
from robbench.specs import SHA256, ModelKind, Name

Side = Annotated[int, Field(gt=0)]
Url = Annotated[str, Field(pattern=r"^(https?|file)://\S+$")]
WeightsFormat = Literal["safetensors", "state-dict"]
FileName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f]+$")]


def _distinct(indices: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(indices)) < len(indices):
        raise ValueError("a logit is named twice")
    return indices


# Which logits of a model are classes of the data set, in the order of these.
LogitIndices = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=2), AfterValidator(_distinct)
]
Real = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Weights(Strict):
    """A weights file, pinned by its sha256.

    Attributes:
        file: path beside the card, in the folder of checkpoints, or in the cache.
        sha256: of the file.
        urls: mirrors to download it from; the first that works is used.
        format: safetensors, or a state dict written by torch.save (read with weights_only=True); None: by the file's
            name.
        key: entry of such a checkpoint with the state dict ("a.b": entry b of entry a, "a.0": the first of a list).
        prefix: of every name in the state dict, which is removed.
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
    """(x - mean) / std per channel, for x in [0,1]: part of the model, so that attacks work on images in [0,1]."""

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
    """The constructor of a module, and its keyword arguments.

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
    """The flow that a defense was trained with."""

    name: str
    sha256: SHA256


class DetectorReference(Strict):
    """The detector that judges the images of a cell.

    Attributes:
        name: of the detector.
        sha256: of its weights.
        function_hash: `DetectorCard.function_hash`.
        threshold: larger scores are flagged.
        noise_std: standard deviation of the noise of the noisy images.
    """

    name: str
    sha256: SHA256
    function_hash: SHA256
    threshold: Real
    noise_std: Positive


class Training(Strict):
    """The training of the weights, sufficient to repeat it.

    Attributes:
        command, seed, recipe, parameters: of `robbench train`; parameters of defense and recipe.
        train_samples, validation_samples: number of images.
        epochs, selected_epoch, selection: trained and selected epochs, and how the latter was selected.
        flow: of a latent or joint defense.
        versions: of the libraries.
        minutes: computing time.
        note: text for people.
    """

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
    """One number in a card.

    Attributes:
        metric, value, unit: the number.
        split, n: data split and number of images.
        lower, upper: its interval; None without one.
        command: that computed it.
        note: text for people.
    """

    metric: str
    value: float
    unit: str
    split: str
    n: int
    lower: float | None = None
    upper: float | None = None
    command: str
    note: str = ""


class Paper(Strict):
    """Where a model was published. title: as short as readers know it; venue: "ICML"; url: of the paper."""

    title: str = ""
    venue: str = ""
    year: int | None = Field(default=None, ge=1900, le=2200)
    url: Annotated[str, Field(pattern=r"^(https://\S+)?$")] = ""


class ClassifierReference(Strict):
    """The classifier that a detector guards. function_hash: of its card (`ModelCard.function_hash`)."""

    name: str
    function_hash: SHA256


class TrainingAttack(Strict):
    """One attack that a detector was trained against, and the noise beside it.

    Attributes:
        name: the attack with its budget, as in tables.
        epsilon, eta: its budgets; None where it has none.
        examples: images it broke; each gives a clean, a noisy and an adversarial image.
        mean_l2: mean L2 norm of its perturbations, and of the noise after clipping to [0,1].
        noise_std: standard deviation of that noise before clipping.
    """

    name: str
    epsilon: float | None = None
    eta: float | None = None
    examples: int = Field(gt=0)
    mean_l2: Positive
    noise_std: Positive


class DetectorSplit(Strict):
    """Which images trained a detector, by number; all are drawn with the seed of its card.

    Attributes:
        reference: clean training images that say what is ordinary.
        attacked: validation images that were attacked.
        threshold: clean validation images, disjoint from those, that fixed the threshold.
        sha256: over the ids of the three.
    """

    reference: int = Field(gt=0)
    attacked: int = Field(gt=0)
    threshold: int = Field(gt=0)
    sha256: SHA256


class DetectorCard(Strict):
    """card.yaml of a detector of adversarial images.

    Attributes:
        schema_version: of the card.
        name, kind, description: of the detector.
        dataset: of its images.
        detector: its name in the registry (`robbench train --detector`); parameters: with defaults filled in.
        classifier: the model that it guards.
        layers: where its features come from.
        input_shape: (C,H,W); classes: of the classifier.
        attacks, split, seed: of its training.
        threshold: larger scores are flagged. false_positive_rate: requested share of flagged clean images;
            measured_false_positive_rate: that of the `split.threshold` images.
        weights: its file.
        command: that trains it again. versions: of the libraries. minutes: computing time.
    """

    schema_version: Literal[1] = 1
    name: Name
    kind: Literal["detector"] = "detector"
    description: str
    dataset: str
    detector: str
    parameters: dict[str, Any]
    classifier: ClassifierReference
    layers: tuple[str, ...] = Field(min_length=1)
    input_shape: tuple[Side, Side, Side]
    classes: int = Field(ge=2)
    attacks: tuple[TrainingAttack, ...] = Field(min_length=1)
    split: DetectorSplit
    seed: int
    threshold: Real
    false_positive_rate: float = Field(ge=0, lt=1)
    measured_false_positive_rate: float = Field(ge=0, le=1)
    weights: Weights
    command: str
    versions: dict[str, str]
    minutes: float
    license: str = "MIT"

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise of noisy images: the mean over its training attacks."""
        return sum(attack.noise_std for attack in self.attacks) / len(self.attacks)

    @property
    def reference(self) -> DetectorReference:
        """What cells record of it."""
        return DetectorReference(
            name=self.name,
            sha256=self.weights.sha256,
            function_hash=self.function_hash,
            threshold=self.threshold,
            noise_std=self.noise_std,
        )

    @property
    def function_hash(self) -> str:
        """Hash of what decides whether an image is flagged: the classifier's function, detector, parameters, layers,
        weights and threshold."""
        parts = {"detector", "parameters", "classifier", "layers", "threshold"}
        content = self.model_dump(mode="json", include=parts)
        del content["classifier"]["name"]
        return canonical_hash({**content, "weights": self.weights.sha256})


class ModelCard(Strict):
    """zoo/NAME/card.yaml.

    Attributes:
        schema_version: of the card.
        name, kind, description: of the model.
        dataset, defense: training data and objective.
        architecture: constructor of the module.
        input_shape: (C,H,W).
        classes: of a classifier; grey_levels: of the images of a flow.
        logits: those that the model is restricted to, by index; None for all. Predictions and attacks see only these.
        preprocessing: normalisation before a classifier's module.
        weights: their file.
        golden: recorded outputs that loading must reproduce.
        training, measurements: where known.
        license, source: texts for people; source is where the model is from, an address or words.
        parameters: trainable numbers of the module.
        paper: where the model was published.
        extra_data: training data beyond the training set of `dataset`, as in "synthetic, 1 M".
        detector: of kind "detector", the card of the detector that guards the classifier of this card; else None.
    """

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
    logits: LogitIndices | None = None
    weights: Weights
    golden: Golden | None = None
    training: Training | None = None
    measurements: tuple[Measurement, ...] = ()
    license: str = "MIT"
    source: str = ""
    parameters: int | None = Field(default=None, gt=0)
    paper: Paper | None = None
    extra_data: str = ""
    detector: DetectorCard | None = None

    @model_serializer(mode="wrap")
    def _without_absent_detector(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if (key, value) != ("detector", None)}

    @model_validator(mode="after")
    def _guarded_by_its_detector(self) -> Self:
        if (self.kind == "detector") != (self.detector is not None):
            raise ValueError(
                "a model of kind detector has the card of its detector, and no other model has one"
            )
        return self

    @model_validator(mode="after")
    def _logits_exist(self) -> Self:
        if self.logits is not None and self.kind == "flow":
            raise ValueError("logits is for classifiers; remove it")
        if self.logits is not None and self.classes is not None and max(self.logits) >= self.classes:
            raise ValueError(
                f"logits names {max(self.logits)}, and {self.classes} classes are 0..{self.classes - 1}"
            )
        return self

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
        """Hash of the function that the model computes: weights, architecture and its arguments, shapes, classes, grey
        levels, and where present preprocessing, the part of the weights file that is read, and the detector's.

        The weights' sha256 is not enough: a flow's scale floor, for example, changes the function but no tensor.
        """
        parts = self.model_dump(mode="json", include={"input_shape", "classes", "grey_levels"})
        # What a card leaves out stays out of the hash too: results of cards written before there was such a key count.
        chosen = {
            "preprocessing": self.preprocessing and self.preprocessing.model_dump(mode="json"),
            "weights_key": self.weights.key,
            "weights_prefix": self.weights.prefix,
            "logits": self.logits,
            "detector": self.detector and self.detector.function_hash,
        }
        return canonical_hash(
            {
                **parts,
                "architecture": self.architecture.identity,
                **{key: value for key, value in chosen.items() if value},
                "weights": self.weights.sha256,
            }
        )

    def guarded(self, detector: DetectorCard) -> "ModelCard":
        """The card of this classifier guarded by `detector`, under the name of that."""
        own = {"name": detector.name, "description": detector.description, "dataset": detector.dataset}
        return self.model_copy(update={**own, "kind": "detector", "detector": detector})

    @property
    def bare(self) -> "ModelCard":
        """Of a guarded classifier the card of the classifier alone; of any other model the card itself."""
        if self.detector is None:
            return self
        own = {"name": self.detector.classifier.name, "kind": "classifier", "detector": None}
        return self.model_copy(update=own)
