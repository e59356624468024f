"""Schema of training recipes, `recipes/NAME.yaml`. No torch here."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from robbench.cards import Architecture
from robbench.core.resources import data_root
from robbench.core.schema import Strict, load_yaml
from robbench.specs import ModelKind


class Recipe(Strict):
    """recipes/NAME.yaml: a training schedule (optimiser, epochs, augmentation), of a paper or of robbench.

    Attributes:
        name, description, reference: texts for people.
        kind: of the trained model.
        default_for: data sets whose default it is.
        architecture: default one.
        parameters: settings by defense, for recipes of papers that fix them (`--set` takes precedence).
        optimizer, learning_rate, momentum, nesterov, weight_decay: of the optimiser.
        batch_size, epochs: length of a training.
        schedule: rule of the learning rate.
        milestones: epochs, 0-based, from each of which on the factor `decay` applies once more.
        milestones_are_fractions: `milestones` are parts of all epochs instead.
        decay, decay_every_steps, staircase: "exponential-steps" multiplies by `decay` every so many steps, continuously
            or in stairs.
        warmup_samples: length of a linear warm-up, counted in samples.
        gradient_clip_norm: largest norm of a gradient; None clips nothing.
        augmentation: "crop-K" (pad K, random crop), "flip", "translate-F" (shift by at most a part F of the side, new
            pixels black), "shift-F" (the same, new pixels those of the edge).
        selection: keep the last epoch, or the best on the validation images.
        validate_every: epochs between two scorings of the validation images.
        validation_samples: number of scored validation images; None for all.
        patience: early stopping after so many epochs without a better one.
        subset: how --train-samples draws: "flow-lp" is the random split with seed 9999 of Yuksel et al., from the whole
            original training set; "first" its first images, as Stutz et al. use them.
        hold_out: keep the validation images out of the training. False trains on all original training images, which
            requires selection "last"; --train-samples draws from the training split in any case.
        budget_warmup_epochs: budgets and steps of inner attacks grow linearly to full over so many epochs. Small
            networks without batch norm otherwise keep predicting a constant.
    """

    name: str
    description: str
    reference: str = ""
    kind: ModelKind = "classifier"
    default_for: tuple[str, ...] = ()
    architecture: Architecture | None = None
    parameters: dict[str, dict[str, Any]] = Field(default_factory=dict)
    optimizer: Literal["sgd", "adam", "adamax"]
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    batch_size: int = Field(gt=0)
    epochs: int = Field(gt=0)
    schedule: Literal["constant", "multistep", "exponential-steps", "cosine"] = "constant"
    milestones: tuple[float, ...] = ()
    milestones_are_fractions: bool = False
    decay: float = Field(default=1.0, gt=0)
    decay_every_steps: int = Field(default=0, ge=0)
    staircase: bool = False
    warmup_samples: int = Field(default=0, ge=0)
    gradient_clip_norm: float | None = Field(default=None, gt=0)
    augmentation: tuple[str, ...] = ()
    selection: Literal["last", "validation"] = "last"
    validate_every: int = Field(default=1, gt=0)
    validation_samples: int | None = Field(default=None, gt=0)
    patience: int | None = Field(default=None, gt=0)
    subset: Literal["stratified", "flow-lp", "first"] = "stratified"
    hold_out: bool = True
    budget_warmup_epochs: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _selects_on_unseen_images(self) -> Self:
        if self.selection == "validation" and not self.hold_out:
            raise ValueError("hold_out false trains on the validation images; selection must then be last")
        return self


def recipes() -> dict[str, Recipe]:
    """Every shipped training recipe by name."""
    found = (load_yaml(path, Recipe) for path in sorted((data_root() / "recipes").glob("*.yaml")))
    return {recipe.name: recipe for recipe in found}
