"""`robbench train --detector`, its card and what loads it, on real files and the real command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from robbench.attacks import Victim, build_attack
from robbench.attacks.search.task import Samples
from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.detectors import Detector
from robbench.detectors.attacked import attack_samples
from robbench.detectors.loading import build_detector, load_detector
from robbench.models.loading import load_model
from robbench.models.zoo import read_detector, read_entry, zoo_entries
from robbench.specs import resolve_attack, threat_models

TRAIN = ("train", "--detector", "lid", "--model", "tiny-a", "--attacks", "fgsm")
SMALL = ("--layer", 8, "--n", 60, "--set", "k=10")


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with tiny-a, tiny-b and a LID detector of tiny-a. Read only."""
    zoo = tmp_path_factory.mktemp("guarded")
    for name in ("tiny-a", "tiny-b"):
        shutil.copytree(tiny_zoo / name, zoo / name)
    result = invoked(*TRAIN, "--zoo", zoo, "--out", zoo, *SMALL)
    assert result.exit_code == 0, result.output
    assert f"DETECTOR {zoo / 'tiny-a-lid'}" in result.output
    return zoo


def loaded(folder: Path, name: str = "tiny-a") -> Detector:
    return load_detector(read_detector(folder / "tiny-a-lid"), load_model(read_entry(folder / name)))


def refused(*arguments: object) -> str:
    """The one line on which a command ends with exit code 2."""
    result = invoked(*arguments)
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1
    return result.output


def test_card(folder: Path, digits) -> None:
    card = read_detector(folder / "tiny-a-lid").card
    model = read_entry(folder / "tiny-a").card
    assert card.kind == "detector"
    assert (card.classifier.name, card.classifier.function_hash) == ("tiny-a", model.function_hash)
    assert (card.layers, card.detector, card.seed, card.parameters["k"]) == (("8",), "lid", 0, 10)
    assert [attack.name for attack in card.attacks] == ["fgsm"]
    assert 0 < card.attacks[0].examples <= 60
    assert (card.split.reference, card.split.attacked) == (1000, 60)
    assert card.split.threshold == len(digits.validation) - 60
    assert card.measured_false_positive_rate <= card.false_positive_rate == 0.05
    assert "--layer 8 --n 60" in card.command


def test_the_threshold_flags_the_stated_share_of_the_images_that_were_not_attacked(
    folder: Path, digits
) -> None:
    """And the loaded detector computes what the trained one did."""
    detector, card = loaded(folder), read_detector(folder / "tiny-a-lid").card
    scores = detector.scores_of(digits.validation.x(torch.arange(len(digits.validation))))
    flagged = int(detector.flags(scores).sum())
    on_threshold = round(card.measured_false_positive_rate * card.split.threshold)
    assert on_threshold <= flagged <= on_threshold + 60
    assert detector.pointwise


def test_the_same_command_trains_the_same_detector(folder: Path, tmp_path: Path) -> None:
    result = invoked(*TRAIN, "--zoo", folder, "--out", tmp_path, *SMALL, "--name", "again")
    assert result.exit_code == 0, result.output
    first, again = read_detector(folder / "tiny-a-lid").card, read_detector(tmp_path / "again").card
    assert again.function_hash == first.function_hash
    assert again.split == first.split
    assert again.threshold == first.threshold


def test_quirks_train_on_whole_minibatches(tiny_zoo: Path, tmp_path: Path) -> None:
    """Of 120 images of the threshold 100: the last 20 have too few neighbours among themselves."""
    options = ("--set", "quirks=true", "--set", "minibatch=50")
    result = invoked(*TRAIN, "--zoo", tiny_zoo, "--out", tmp_path, *SMALL, *options)
    assert result.exit_code == 0, result.output
    card = read_detector(tmp_path / "tiny-a-lid").card
    assert (card.split.threshold, card.attacks[0].examples) == (100, 50)
    detector = load_detector(
        read_detector(tmp_path / "tiny-a-lid"), load_model(read_entry(tiny_zoo / "tiny-a"))
    )
    assert not detector.pointwise


def test_another_classifier_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"was trained for classifier 'tiny-a' .* 'tiny-b' is another function"
    ) as error:
        loaded(folder, "tiny-b")
    assert "robbench train --detector lid --model tiny-b" in str(error.value)


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tiny-a-lid", tmp_path / "own")
    card, file = tmp_path / "own" / "card.yaml", tmp_path / "own" / "weights.safetensors"
    model, content = load_model(read_entry(folder / "tiny-a")), yaml.safe_load(card.read_text())

    def problem(**changes: object) -> str:
        card.write_text(yaml.safe_dump({**content, **changes}))
        with pytest.raises(UserError) as error:
            load_detector(read_detector(tmp_path / "own"), model)
        return str(error.value)

    assert "unknown layer '80'" in problem(layers=["80"])
    assert "does not fit it" in problem(layers=["8", "9"])
    assert "unknown detector 'lidd'; did you mean 'lid'" in problem(detector="lidd")
    assert "key layers" in problem(layers=[])
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert "has sha256" in problem()
    file.unlink()
    assert "is missing; restore it, or train it again" in problem()


def test_listed_and_shown(folder: Path) -> None:
    line = "tiny-a-lid\tdigits\t\tlid\tlid on tiny-a, trained against fgsm"
    assert line in invoked("list", "models", "--zoo", folder).output.splitlines()
    found = json.loads(invoked("list", "models", "--zoo", folder, "--json").output)
    assert {one["name"]: one["kind"] for one in found}["tiny-a-lid"] == "detector"
    for named in (
        ("tiny-a-lid", "--zoo", folder),
        (folder / "tiny-a-lid",),
        (folder / "tiny-a-lid" / "card.yaml",),
    ):
        result = invoked("show", *named)
        assert result.exit_code == 0, result.output
        assert "kind: detector" in result.output
    shown = json.loads(invoked("show", "tiny-a-lid", "--zoo", folder, "--json").output)
    assert shown["found"][0]["entry"]["card"]["classifier"]["name"] == "tiny-a"


def test_a_detector_is_a_model_only_together_with_its_classifier(folder: Path) -> None:
    assert set(zoo_entries(folder)) >= {"tiny-a", "tiny-b"}
    assert "tiny-a-lid" not in zoo_entries(folder)
    line = refused("run", "--model", folder / "tiny-a-lid", "--attacks", "fgsm", "--n", 4)
    assert (
        "is a detector of classifier 'tiny-a', which is not in the zoo; name the folder that holds both"
        in line
    )
    line = refused("train", "--detector", "lid", "--model", folder / "tiny-a-lid", "--attacks", "fgsm")
    assert "is a detector, not a model; name the classifier that its card names" in line


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--detector", "lib"), "unknown detector 'lib'; did you mean 'lid'"),
        (("--model", "digits-glow"), "is a flow and a detector guards a classifier"),
        (("--attacks", "nosuch"), "unknown attack 'nosuch'"),
        (("--attacks", "nll-in"), "changes the likelihood of a flow"),
        (("--layer", "88"), "unknown layer '88'"),
        (("--set", "k=2000"), "1000 reference images has fewer than the k = 2000 neighbours"),
        (
            ("--set", "quirks=true", "--set", "k=100"),
            "a minibatch of 100 has fewer than the k = 100 neighbours",
        ),
        (("--set", "bandwidth=1"), "key bandwidth: is not known"),
        (("--detector", "kde", "--set", "k=10"), "key k: is not known"),
        (("--n", "91"), "of which half are kept for the threshold; give 1 to 90"),
        (("--false-positive-rate", "1.5"), "give a share of clean images, as in 0.05"),
        (("--dataset", "mnist"), "mnist"),
        (("--recipe", "digits"), "--recipe is of a training with --defense; leave it out"),
        (("--defense", "at"), "--defense and --detector are two trainings; leave one out"),
        (("--name", "a/b"), "is not a folder name"),
    ],
)
def test_bad_requests_end_on_one_line_before_anything_is_written(
    options: tuple[str, ...], problem: str, tiny_zoo: Path, tmp_path: Path
) -> None:
    assert problem in refused(*TRAIN, "--zoo", tiny_zoo, "--out", tmp_path / "out", *options)
    assert not list(tmp_path.rglob("card.yaml"))


def test_too_few_images_and_a_singular_covariance(tiny_zoo: Path, tmp_path: Path) -> None:
    common = ("train", "--model", "tiny-a", "--attacks", "fgsm", "--zoo", tiny_zoo, "--out", tmp_path)
    line = refused(*common, "--detector", "kde", "--set", "reference=40")
    assert "of the 40 clean training images and its density needs 5; use more with --set reference=N" in line
    line = refused(*common, "--detector", "mahalanobis", "--set", "reference=60")
    assert "is singular (rank" in line
    assert "give --set shrinkage=0.01" in line
    assert "--attacks; give one" in refused(*common[:3], "--detector", "kde")
    assert "--model; give one" in refused("train", "--detector", "kde", "--attacks", "fgsm")
    assert "are both missing" in refused("train")
    assert "--model is of a training with --detector" in refused(
        "train", "--defense", "at", "--model", "tiny-a"
    )


def test_an_attack_without_adversarial_examples_is_refused(folder: Path, digits) -> None:
    model = load_model(read_entry(folder / "tiny-a"))
    rows = torch.arange(8)
    samples = Samples(digits.validation.ids[rows], digits.validation.x(rows), digits.validation.labels[rows])
    attack = build_attack(resolve_attack("fgsm", "digits", threat_models(), epsilon=0.0))
    detector = build_detector("kde", model.module, (), {}, samples.x[:2])
    with pytest.raises(
        UserError, match=r"--attacks fgsm@0: it broke none of the \d images that the classifier gets"
    ):
        attack_samples(detector, Victim(model.module), attack, samples, 0)


def test_adversarial_examples_train_beside_noise_as_far(folder: Path, digits) -> None:
    model = load_model(read_entry(folder / "tiny-a"))
    rows = torch.arange(40)
    x, y = digits.validation.x(rows), digits.validation.labels[rows]
    attack = build_attack(resolve_attack("fgsm", "digits", threat_models()))
    detector = build_detector("kde", model.module, (), {}, x[:2])
    found = attack_samples(
        detector, Victim(model.module), attack, Samples(digits.validation.ids[rows], x, y), 0
    )
    kept = [int(row) for row in rows if any(torch.equal(x[row], image) for image in found.clean)]
    predicted = (model.module(x[kept]).argmax(1), model.module(found.adversarial).argmax(1))
    assert torch.equal(predicted[0], y[kept])
    assert bool((predicted[1] != y[kept]).all())
    moved = [
        (each - found.clean).flatten(1).norm(dim=1).mean().item() for each in (found.noisy, found.adversarial)
    ]
    assert moved[0] == pytest.approx(moved[1], rel=1e-5)
    assert moved[1] == pytest.approx(found.record.mean_l2, rel=1e-5)
    assert found.record.examples == len(found.clean)
