"""Detectors of experiments: what the schema refuses, which are planned, trained, found again and left out."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import saved_model, trained_classifier

from robbench.core.errors import UserError
from robbench.core.schema import validate
from robbench.experiments import guards
from robbench.experiments.cost import ExperimentCosts
from robbench.experiments.guards import train_guards
from robbench.experiments.request import ExperimentRequest
from robbench.experiments.runs import ExperimentPlan, plan_experiment
from robbench.experiments.schema import Experiment, Scale
from robbench.models.zoo import read_detector

GUARDED: dict[str, Any] = {
    "name": "guarded",
    "title": "t",
    "source": "ours",
    "published": None,
    "dataset": "digits",
    "doubts": ["d"],
    "models": {"plain": {"defense": "standard", "recipe": "digits", "seeds": [0, 1]}},
    "detectors": {
        "density": {
            "detector": "kde",
            "model": "plain",
            "attacks": ["fgsm"],
            "settings": {"reference": 200, "bandwidth": 1.0},
        },
        "unused": {"detector": "lid", "model": "plain", "attacks": ["fgsm"]},
    },
    "rows": [{"title": "KD", "model": "density"}],
    "columns": [
        {"title": "ACC-NADV", "metric": "acc_nadv", "attack": "fgsm"},
        {"title": "ACC-COM", "metric": "acc_com", "attack": "fgsm"},
    ],
}
NAMES = ["density-seed0-scale0.5", "density-seed1-scale0.5"]


def planned(folder: Path, **changes: Any) -> ExperimentPlan:
    request = ExperimentRequest(Experiment.model_validate(GUARDED | changes), Scale(0.5), device="cpu")
    return plan_experiment(request, folder)


def test_a_detector_is_planned_for_every_seed_of_its_classifier(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert [guard.name for guard in plan.guards] == NAMES
    assert plan.names("density") == tuple(NAMES)
    first = plan.guards[0]
    assert first.requires == "plain-seed0-scale0.5"
    assert first.request.model == str(plan.jobs[0].folder)
    assert (first.request.attacks, first.request.n) == (("fgsm",), 45)
    assert planned(tmp_path, dataset="digits").jobs[0].name == "plain-seed0-scale0.5"


def test_detectors_are_attacked_in_place_of_their_classifiers(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    request = plan.run_request({NAMES[1]: "no example"})
    assert request.models == (str(plan.guards[0].folder),)
    assert request.zoo == tmp_path / "models"
    assert {cell.model for cell in ExperimentCosts(plan).cells()} == set(NAMES)


def test_classifiers_of_detectors_lie_in_one_folder(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Elsewhere:
        name: str
        member: str
        folder: Path

    plan = planned(tmp_path / "out")
    names = [job.name for job in plan.jobs]
    together = [Elsewhere(name, "plain", tmp_path / "zoo" / name) for name in names]
    assert guards.guarded_zoo(plan.guards, together) == tmp_path / "zoo"
    apart = [together[0], replace(together[1], folder=tmp_path / "other" / names[1])]
    with pytest.raises(UserError, match=f"copy '{names[1]}' into the former"):
        guards.guarded_zoo(plan.guards, apart)


def test_a_detector_without_its_classifier_is_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def train(request: Any, tell: Any) -> Path:
        trained.append(request.name)
        raise UserError("fgsm broke no image")

    monkeypatch.setattr(guards, "train_detector", train)
    told: list[str] = []
    failed = train_guards(planned(tmp_path).guards, {"plain-seed0-scale0.5": "nan"}, told.append)
    assert trained == NAMES[1:]
    assert failed == {
        NAMES[0]: "its classifier plain-seed0-scale0.5 failed to train",
        NAMES[1]: "fgsm broke no image",
    }


def test_a_trained_detector_is_found_again_and_another_one_refused(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    models = tmp_path / "models"
    saved_model(models, "plain-seed0-scale0.5", trained_classifier(0, epochs=3))
    told: list[str] = []
    assert train_guards(plan.guards[:1], {}, told.append) == {}
    assert read_detector(models / NAMES[0]).card.classifier.name == "plain-seed0-scale0.5"
    found = guards.guard_jobs(plan.request, models, plan.jobs[0].dataset, plan.jobs, {"density"})
    assert found[0].finished is not None
    assert train_guards(found[:1], {}, told.append) == {}
    assert told[-1].startswith(f"detector {NAMES[0]}: trained already")
    other = GUARDED["detectors"]["density"] | {"settings": {"reference": 300}}
    experiment = Experiment.model_validate(GUARDED | {"detectors": {"density": other}})
    with pytest.raises(UserError, match=re.escape("(its parameter reference differ)")):
        guards.guard_jobs(
            replace(plan.request, experiment=experiment), models, plan.jobs[0].dataset, plan.jobs, {"density"}
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": [{"title": "r", "model": "plain"}]}, "'acc_nadv' of row 'r' is of a detector"),
        ({"columns": [{"title": "c", "metric": "acc_com"}]}, "is of an attack; name one"),
        ({"columns": [{"title": "c", "metric": "embedding_dim"}]}, "is of a model, not of a detector"),
        (
            {"detectors": {"density": {"detector": "kde", "model": "x", "attacks": ["fgsm"]}}},
            "`models` lacks: x",
        ),
        ({"detectors": {"density": {"detector": "kde", "model": "plain", "attacks": []}}}, "attacks"),
        ({"models": {"plain": {"defense": "at"}, "unused": {"defense": "at"}}}, "both called 'unused'"),
    ],
)
def test_what_makes_no_sense_is_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        validate({**GUARDED, **changes}, Experiment, "one.yaml")
    assert "\n" not in str(caught.value)
