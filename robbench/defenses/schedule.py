"""A recipe in use: optimiser, learning rate at a step, augmentation of a batch, choice of samples."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from robbench.core.errors import UserError, unknown_name
from robbench.core.random import derive_seed
from robbench.core.schema import load_yaml
from robbench.data import Dataset, Split
from robbench.recipes import Recipe, recipes
from robbench.specs import ModelKind

FLOW_LP_SEED = 9999


def find_recipe(name: str | None, dataset: str, kind: ModelKind) -> Recipe:
    """The recipe called `name` (or the YAML file of that path), by default the one of data set and kind."""
    known = recipes()
    if name is None:
        found = next((r for r in known.values() if r.kind == kind and dataset in r.default_for), None)
        if found is None:
            raise UserError(
                f"data set {dataset!r} has no default {kind} recipe; "
                f"name one with --recipe: {_names(known, kind)}"
            )
        return found
    recipe = load_recipe(name)
    if recipe.kind != kind:
        raise UserError(
            f"--recipe {name!r} trains a {recipe.kind} and this defense a {kind}; "
            f"choose one of: {_names(known, kind)}"
        )
    return recipe


def load_recipe(name: str) -> Recipe:
    """The recipe called `name`, or the YAML file of that path; `UserError` when there is none."""
    known = recipes()
    if name not in known and name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return load_yaml(Path(name), Recipe)
    if name not in known:
        raise unknown_name("recipe", name, known, "or give the path of a recipe's YAML file")
    return known[name]


def _names(known: dict[str, Recipe], kind: ModelKind) -> str:
    return ", ".join(sorted(r.name for r in known.values() if r.kind == kind)) or "none"


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser over all trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, rate, momentum=recipe.momentum, weight_decay=decay, nesterov=recipe.nesterov
        )
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, rate, weight_decay=decay)
    return torch.optim.Adamax(parameters, rate, weight_decay=decay)


def move_weights(optimizer: torch.optim.Optimizer, rate: float, clip_norm: float | None) -> None:
    """One step of `optimizer` at learning rate `rate`, after clipping the norm of its gradients to `clip_norm`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    if clip_norm is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
    optimizer.step()


def learning_rate(recipe: Recipe, epoch: int, step: int, steps_an_epoch: int) -> float:
    """Learning rate of step `step` (from 0, over all epochs) in epoch `epoch` (from 0).

    A pure function of the position, so that a resumed training needs no scheduler state.
    """
    warm = 1.0
    if recipe.warmup_samples:
        warm = min(1.0, (step + 1) * recipe.batch_size / recipe.warmup_samples)
    return recipe.learning_rate * warm * _decay(recipe, epoch, step, steps_an_epoch)


def _decay(recipe: Recipe, epoch: int, step: int, steps_an_epoch: int) -> float:
    if recipe.schedule == "multistep":
        scale = recipe.epochs if recipe.milestones_are_fractions else 1.0
        # Rounded, because .34 of 150 epochs is slightly more than 51 in floating point.
        passed = sum(epoch >= round(milestone * scale, 6) for milestone in recipe.milestones)
        return float(recipe.decay**passed)
    if recipe.schedule == "exponential-steps":
        exponent = step / max(recipe.decay_every_steps, 1)
        return float(recipe.decay ** (math.floor(exponent) if recipe.staircase else exponent))
    if recipe.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * step / (recipe.epochs * steps_an_epoch)))
    return 1.0


def augment(x: Tensor, names: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Images x [B,C,H,W] in [0,1] after the recipe's augmentations. New pixels at the border are 0, or for "shift"
    those of the edge."""
    for name in names:
        kind, _, amount = name.partition("-")
        if kind == "flip":
            x = torch.where(torch.rand((len(x), 1, 1, 1), generator=generator) < 0.5, x.flip(3), x)
        elif kind == "crop":
            x = shift_images(x, int(amount), int(amount), generator)
        else:
            height, width = x.shape[2:]
            most = round(float(amount) * height), round(float(amount) * width)
            x = shift_images(x, *most, generator, edge=kind == "shift")
    return x


def check_augmentation(recipe: Recipe) -> None:
    """`UserError` for an unknown augmentation."""
    for name in recipe.augmentation:
        kind, _, amount = name.partition("-")
        fine = (kind == "flip" and not amount) or (kind == "crop" and amount.isdigit() and int(amount) > 0)
        if not (fine or (kind in ("translate", "shift") and _is_fraction(amount))):
            raise UserError(
                f"recipe {recipe.name!r}: unknown augmentation {name!r}; "
                f"use crop-PIXELS, flip, translate-PART or shift-PART (crop-4, translate-0.1)"
            )


def _is_fraction(text: str) -> bool:
    try:
        return 0.0 < float(text) < 1.0
    except ValueError:
        return False


def shift_images(
    x: Tensor, vertical: int, horizontal: int, generator: torch.Generator, edge: bool = False
) -> Tensor:
    """Images shifted by whole pixels, drawn per image uniformly from [-vertical, vertical] x [-horizontal, horizontal].
    New pixels are 0, or with `edge` the nearest one of the image."""
    n, channels, height, width = x.shape
    sides = (horizontal, horizontal, vertical, vertical)
    padded = functional.pad(x, sides, mode="replicate") if edge else functional.pad(x, sides)
    top = torch.randint(0, 2 * vertical + 1, (n, 1), generator=generator)
    left = torch.randint(0, 2 * horizontal + 1, (n, 1), generator=generator)
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = (left + torch.arange(width))[:, None, None, :]
    return padded[
        torch.arange(n)[:, None, None, None], torch.arange(channels)[None, :, None, None], rows, columns
    ]


def training_splits(dataset: Dataset, n: int | None, recipe: Recipe, seed: int) -> tuple[Split, Split]:
    """(training images, validation images).

    n: size of the training subset, None for the whole training split, or for both splits in order of their ids where
    the recipe holds nothing out (the validation images are then trained on).

    "stratified": equal class shares; a smaller n is contained in a larger one of the same seed. "flow-lp": positions of
    `torch.utils.data.random_split` with seed 9999 in the original training set (Yuksel et al.). "first": its first n
    images (Stutz et al.). In both, chosen validation images leave the validation split.
    """
    train, validation = dataset.train, dataset.validation
    if n is None:
        return train if recipe.hold_out else _pool(train, validation), validation
    if recipe.subset != "stratified":
        return _fixed_splits(train, validation, n, recipe.subset)
    if not 0 < n <= len(train):
        raise UserError(
            f"--train-samples {n}: {dataset.name} has {len(train)} training images; give 1 to {len(train)}"
        )
    return train.subset(stratified_positions(train.labels, n, seed)), validation


def stratified_positions(labels: Tensor, n: int, seed: int) -> Tensor:
    """`n` sorted positions with equal class shares (up to rounding); for one seed a smaller n is contained in a
    larger."""
    order = torch.randperm(len(labels), generator=generator_for(seed, 0, "subset"))
    shares = torch.empty(len(labels), dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        members = order[labels[order] == label]
        shares[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    ranked = order[torch.argsort(shares[order], stable=True)]
    return ranked[:n].sort().values


def flow_lp_ids(total: int, n: int) -> Tensor:
    """Ids of the first part of `random_split([n, rest], generator seed 9999)` of `total` images."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(FLOW_LP_SEED))[:n]


def _pool(train: Split, validation: Split) -> Split:
    """The images of both splits in order of their ids, which is the original training set where there is one."""
    pool = Split(
        torch.cat([train.ids, validation.ids]),
        torch.cat([train.labels, validation.labels]),
        torch.cat([train.pixels, validation.pixels]),
        train.levels,
    )
    return pool.subset(torch.argsort(pool.ids))


def _fixed_splits(train: Split, validation: Split, n: int, subset: str) -> tuple[Split, Split]:
    pool = _pool(train, validation)
    if not torch.equal(pool.ids, torch.arange(len(pool))):
        raise UserError(
            f"subset {subset} needs a data set with an official training set; use a stratified recipe"
        )
    if not 0 < n <= len(pool):
        raise UserError(f"--train-samples {n}: there are {len(pool)} training images; give 1 to {len(pool)}")
    chosen = flow_lp_ids(len(pool), n) if subset == "flow-lp" else torch.arange(n)
    kept = ~torch.isin(validation.ids, chosen)
    if not bool(kept.any()):
        raise UserError(
            f"--train-samples {n} leaves no validation image in the {subset} convention; give fewer"
        )
    return pool.subset(chosen), validation.subset(kept.nonzero().squeeze(1))


def generator_for(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """CPU generator keyed by (seed, epoch, purpose), so that the draws of an epoch do not depend on interruptions."""
    return torch.Generator().manual_seed(derive_seed(seed, epoch, purpose))
