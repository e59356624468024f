"""Recipes as numbers: learning rates, augmentation, subsets; and every shipped recipe is complete."""

import pytest
import torch

from robbench.core.errors import UserError
from robbench.data import Split
from robbench.data.base import Dataset
from robbench.defenses import Setting, build_defense, defense_kinds
from robbench.defenses.plan import schedule_of
from robbench.defenses.schedule import (
    augment,
    build_optimizer,
    check_augmentation,
    find_recipe,
    flow_lp_ids,
    learning_rate,
    shift_images,
    stratified_positions,
    training_splits,
)
from robbench.models.loading import ARCHITECTURES, is_flow
from robbench.recipes import Recipe, recipes
from robbench.specs import threat_models

RECIPES = recipes()
DATASETS = {"mnist": "mnist", "fashionmnist": "fashionmnist", "cifar100": "cifar100", "svhn": "svhn"}


class AnyFlow:
    """Stands for a flow where only the parameters are looked at."""


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_complete(name):
    recipe = RECIPES[name]
    check_augmentation(recipe)
    assert recipe.architecture is not None
    assert recipe.architecture.name in ARCHITECTURES
    assert is_flow(recipe.architecture) == (recipe.kind == "flow")
    assert build_optimizer(recipe, torch.nn.Linear(2, 2)).param_groups[0]["lr"] == recipe.learning_rate
    dataset = next((d for key, d in DATASETS.items() if key in name), "cifar10")
    for defense, parameters in recipe.parameters.items():
        assert recipe.kind in defense_kinds(defense)
        resolved = build_defense(defense, parameters, Setting(dataset, threat_models(), AnyFlow())).parameters
        assert all(getattr(resolved, key) == value for key, value in parameters.items())


def test_one_default_recipe_a_data_set_and_kind():
    for kind in ("classifier", "flow"):
        named = [d for r in RECIPES.values() if r.kind == kind for d in r.default_for]
        assert len(named) == len(set(named))
        assert set(named) >= {"digits", "fashionmnist", "mnist", "cifar10", "cifar100", "svhn", "stl10"}
        assert find_recipe(None, "digits", kind).kind == kind
    with pytest.raises(UserError, match="--recipe"):
        find_recipe(None, "unheard-of", "classifier")


def test_ijsat_drops_at_75_90_and_100():
    recipe = RECIPES["ijsat-cifar"]
    rates = [learning_rate(recipe, epoch, epoch * 391, 391) for epoch in (0, 74, 75, 89, 90, 100, 119)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-4, 1e-4])


def test_fractions_scale_with_the_epochs():
    recipe = RECIPES["ijsat-cifar-c"]
    assert learning_rate(recipe, 50, 0, 1) == pytest.approx(0.1)
    assert learning_rate(recipe, 51, 0, 1) == pytest.approx(0.01)
    assert learning_rate(recipe.model_copy(update={"epochs": 15}), 6, 0, 1) == pytest.approx(0.01)


def test_the_papers_decay_continuously_and_stairs_can_be_asked_for():
    continuous, paper = RECIPES["flow-lp-mnist"], RECIPES["flow-lp-fashionmnist"]
    stairs = paper.model_copy(update={"staircase": True})
    assert learning_rate(paper, 0, 250, 1) == pytest.approx(1e-2 * 0.9**0.5)
    assert learning_rate(continuous, 0, 5_000, 1) == pytest.approx(1e-3 * 0.1**0.5)
    assert learning_rate(stairs, 0, 499, 1) == pytest.approx(1e-2)
    assert learning_rate(stairs, 0, 500, 1) == pytest.approx(9e-3)


def test_the_warm_up_of_the_glow_counts_samples_not_steps():
    """500,000 samples at batch 64 are 7,812.5 steps."""
    recipe = RECIPES["glow-flow-lp"]
    rates = [learning_rate(recipe, 0, step, 10**6) for step in (0, 3905, 7812)]
    assert rates[0] == pytest.approx(5e-4 * 64 / 500_000)
    assert rates[1] == pytest.approx(2.5e-4, rel=1e-3)
    assert rates[2] == 5e-4


def test_cosine_ends_near_zero():
    recipe = Recipe(
        name="r",
        description="",
        optimizer="adam",
        learning_rate=1.0,
        batch_size=1,
        epochs=4,
        schedule="cosine",
    )
    assert learning_rate(recipe, 0, 0, 10) == 1.0
    assert learning_rate(recipe, 2, 20, 10) == pytest.approx(0.5)
    assert learning_rate(recipe, 3, 39, 10) < 0.002


# ----------------------------------------------------------------------------------------------- augmentation
def test_a_crop_is_a_shift_by_whole_pixels_with_zeros_coming_in():
    image = torch.arange(1.0, 17.0).reshape(1, 1, 4, 4)
    batch = shift_images(image.expand(200, 1, 4, 4), 2, 1, torch.Generator().manual_seed(0))
    allowed = set()
    for down in range(-2, 3):
        for right in range(-1, 2):
            moved = torch.zeros(8, 8)
            moved[2 + down : 6 + down, 2 + right : 6 + right] = image[0, 0]
            allowed.add(tuple(moved[2:6, 2:6].flatten().tolist()))
    assert {tuple(row.flatten().tolist()) for row in batch} == allowed


def test_augmentations_are_functions_of_the_generator():
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    names = ("crop-2", "flip", "translate-0.25")
    first, second = (augment(x, names, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, x)
    flipped = augment(x, ("flip",), torch.Generator().manual_seed(0))
    changed = [not torch.equal(a, b) for a, b in zip(flipped, x, strict=True)]
    assert 0 < sum(changed) < 8
    assert all(torch.equal(f, o.flip(2)) for f, o, c in zip(flipped, x, changed, strict=True) if c)


@pytest.mark.parametrize("name", ["crop", "crop-0", "crop-x", "flip-2", "translate-2", "translate-", "blur"])
def test_unknown_augmentations_are_refused(name):
    recipe = Recipe(
        name="r",
        description="",
        optimizer="adam",
        learning_rate=1.0,
        batch_size=1,
        epochs=1,
        augmentation=(name,),
    )
    with pytest.raises(UserError, match="crop-PIXELS"):
        check_augmentation(recipe)


# ---------------------------------------------------------------------------------------------------- subsets
def test_stratified_subsets_are_balanced_nested_and_keyed_by_the_seed(digits):
    labels = digits.train.labels
    small, large = (stratified_positions(labels, n, 0) for n in (100, 300))
    shares = torch.bincount(labels) / len(labels)
    assert (torch.bincount(labels[small]) - 100 * shares).abs().max() <= 1
    assert set(small.tolist()) < set(large.tolist())
    assert set(small.tolist()) != set(stratified_positions(labels, 100, 1).tolist())
    assert len(stratified_positions(labels, len(labels), 0).unique()) == len(labels)


def test_the_flow_lp_subset_has_the_check_values_of_the_published_code():
    cifar10 = flow_lp_ids(50_000, 2_500)
    assert cifar10[:5].tolist() == [29142, 21880, 29204, 21304, 34827]
    assert int(cifar10.sum()) == 62_566_668
    assert int(flow_lp_ids(50_000, 5_000).sum()) == 125_548_591
    svhn = flow_lp_ids(73_257, 3_663)
    assert svhn[:3].tolist() == [20724, 35670, 55568]
    assert int(svhn.sum()) == 133_325_471


def made_up(n: int = 100) -> Dataset:
    everything = Split(
        torch.arange(n), torch.arange(n) % 2, torch.arange(n).reshape(n, 1, 1, 1).to(torch.uint8), 256
    )
    validation = torch.arange(0, n, 5)
    kept = torch.tensor([i for i in range(n) if i % 5])
    return Dataset(
        "made-up",
        ("a", "b"),
        256,
        everything.subset(kept),
        everything.subset(validation),
        everything.subset(kept[:4]),
    )


def test_a_flow_lp_subset_is_drawn_from_the_whole_original_training_set():
    dataset = made_up()
    recipe = RECIPES["flow-lp-cifar10"]
    train, validation = training_splits(dataset, 30, recipe, seed=3)
    assert train.ids.tolist() == flow_lp_ids(100, 30).tolist()
    assert train.images.flatten().tolist() == train.ids.tolist()
    assert not set(train.ids.tolist()) & set(validation.ids.tolist())
    assert set(validation.ids.tolist()) < set(dataset.validation.ids.tolist())


def test_schedules_that_select_nothing_train_on_every_original_training_image():
    dataset = made_up()
    for recipe in RECIPES.values():
        train, validation = training_splits(dataset, None, recipe, seed=3)
        assert recipe.hold_out == (recipe.selection == "validation"), recipe.name
        if recipe.hold_out:
            assert (train, validation) == (dataset.train, dataset.validation)
            continue
        assert train.ids.tolist() == list(range(100))
        assert train.images.flatten().tolist() == train.ids.tolist()
        assert train.labels.tolist() == [i % 2 for i in range(100)]
        assert validation is dataset.validation


def test_an_epoch_is_never_chosen_on_training_images():
    with pytest.raises(ValueError, match="selection must then be last"):
        Recipe.model_validate({**RECIPES["digits"].model_dump(), "hold_out": False})


def test_schedules_of_models_that_are_there_are_recorded_as_before():
    assert "hold_out" not in schedule_of(RECIPES["digits"])
    assert schedule_of(RECIPES["ijsat-cifar"])["hold_out"] is False


def test_the_first_images_are_those_of_the_original_training_set():
    dataset = made_up()
    recipe = RECIPES["flow-lp-fashionmnist"].model_copy(update={"subset": "first"})
    train, validation = training_splits(dataset, 30, recipe, seed=3)
    assert train.ids.tolist() == list(range(30))
    assert train.images.flatten().tolist() == list(range(30))
    assert validation.ids.tolist() == list(range(30, 100, 5))
    with pytest.raises(UserError, match="leaves no validation image in the first convention"):
        training_splits(dataset, 100, recipe, 0)


def test_subset_sizes_that_do_not_exist_are_refused(digits):
    for n in (0, 1258):
        with pytest.raises(UserError, match="--train-samples"):
            training_splits(digits, n, RECIPES["digits"], 0)
    with pytest.raises(UserError, match="flow-lp"):
        training_splits(digits, 100, RECIPES["flow-lp-cifar10"], 0)
    with pytest.raises(UserError, match="--train-samples"):
        training_splits(made_up(), 101, RECIPES["flow-lp-cifar10"], 0)


def test_a_shift_repeats_the_edge_and_a_translation_is_black():
    x = torch.full((64, 1, 10, 10), 0.5)
    generator = torch.Generator().manual_seed(0)
    assert bool((augment(x, ("translate-0.2",), generator) == 0).any())
    assert torch.equal(augment(x, ("shift-0.2",), generator), x)
    ramp = torch.arange(10.0).expand(64, 1, 10, 10) / 10
    places = torch.arange(10)
    for image in augment(ramp, ("shift-0.2",), generator)[:, 0, 0]:
        step = int((image * 10).round()[5]) - 5
        assert abs(step) <= 2
        assert torch.allclose(image, (places + step).clamp(0, 9) / 10)
