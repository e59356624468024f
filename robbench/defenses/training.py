"""The training loop of all defenses: from a request to a finished zoo folder.

Every random draw comes from a generator keyed by (seed, epoch, purpose), so that a training that was interrupted and
resumed ends with the same weights, bit for bit (same machine, same number of threads).
"""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from robbench import __version__
from robbench.cards import Measurement, Training
from robbench.core.errors import UserError
from robbench.core.foreign import foreign_code
from robbench.core.places import Place
from robbench.core.random import derive_seed
from robbench.core.stops import check_stop
from robbench.core.threads import multiply_adds, search_multiply_adds, threads_for
from robbench.defenses import checkpoint, selection
from robbench.defenses.base import Optimization
from robbench.defenses.checkpoint import Progress
from robbench.defenses.plan import Plan, TrainRequest, check_places, make_plan, training_lock
from robbench.defenses.schedule import augment, generator_for, learning_rate
from robbench.defenses.settings import parse_settings
from robbench.models.flows.base import Flow
from robbench.models.loading import build_architecture, save_model_folder

__all__ = ["Report", "TrainRequest", "parse_settings", "train"]

GOLDEN_IMAGES = 4


@dataclass(frozen=True)
class Report:
    """Argument of a progress callback, called after every step, and with `epoch_done` after an epoch's checkpoint.

    Attributes:
        epoch, step: from 1.
        epochs, steps: their totals; steps per epoch.
        loss: mean over the epoch so far.
        learning_rate: of the step.
        criterion: of the selection.
        score: validation score of the last scored epoch, in percent or bits/dim; None before the first.
        best, best_epoch: score and number of the best epoch.
        seconds: computing time over all sessions.
        epoch_done: whether the epoch is finished and stored.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    criterion: str
    score: float | None
    best: float | None
    best_epoch: int
    seconds: float
    epoch_done: bool


def train(request: TrainRequest, progress: Callable[[Report], None] | None = None) -> Path:
    """Train or resume; returns the finished zoo folder OUT/NAME.

    A checkpoint of the same training in OUT is resumed, and deleted when the folder is finished. `UserError` for errors
    of the request, while another process trains OUT/NAME, and when the loss stops being finite.
    """
    plan = make_plan(request)
    with _lock_output(plan):
        check_places(request.out, plan.name)  # another training may have finished meanwhile
        trainer = Trainer(plan, progress or _ignore)
        with threads_for(trainer.multiply_adds):
            trainer.run()
            trainer.finish()  # records the number of threads
        plan.checkpoint.unlink(missing_ok=True)
    return plan.folder


@contextmanager
def _lock_output(plan: Plan) -> Iterator[None]:
    """`training_lock`, without what a killed training left half written."""
    with training_lock(plan.folder):
        for half_written in plan.checkpoint.parent.glob(f".{plan.checkpoint.name}.*.tmp"):
            half_written.unlink(missing_ok=True)  # of a killed training, since this one has the lock
        yield


def _ignore(report: Report) -> None:
    """Progress callback that does nothing."""


class Trainer:
    """Runs a plan: model, optimisation, and `state` as of the last finished epoch."""

    def __init__(self, plan: Plan, notify: Callable[[Report], None]) -> None:
        self.plan, self.recipe, self._notify = plan, plan.recipe, notify
        self.steps = len(self._batches(0))
        self._place: Place | None = None
        self.model = self._fresh_model()
        self.optimization = self._fresh_optimization()
        found = checkpoint.load(plan.checkpoint, plan.identity, plan.device)
        self.state = found or Progress(self.model.state_dict(), self.optimization.state_dict())
        if found is not None:
            self.model.load_state_dict(found.model)
            self.optimization.load_state_dict(found.optimizer)

    def _fresh_model(self) -> nn.Module:
        """A model with initial weights that depend on the seed only; the caller's random state is not changed."""
        dataset = self.plan.dataset
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.plan.request.seed, "initialisation"))
            model = build_architecture(
                self.plan.architecture, dataset.shape, dataset.classes, dataset.grey_levels
            )
        return model.to(self.plan.device)

    def _fresh_optimization(self) -> Optimization:
        """The defense's; initial weights of its networks depend on the seed only."""
        with torch.random.fork_rng(devices=[]), self._foreign():
            torch.manual_seed(derive_seed(self.plan.request.seed, "optimization"))
            return self.plan.defense.optimization(self.model, self.recipe)

    def multiply_adds(self) -> float:
        """Multiply-adds per image of the model, and of the flow of a latent or joint defense."""
        plan = self.plan
        x = torch.zeros(1, *plan.dataset.shape, device=plan.device)
        y = torch.zeros(1, dtype=torch.int64, device=plan.device)
        model = deepcopy(self.model).eval()
        if isinstance(model, Flow):
            return multiply_adds(lambda: model.log_prob(x, y))
        return search_multiply_adds(
            model, plan.defense.setting.flow if plan.defense.needs_flow else None, x, y
        )

    def run(self) -> None:
        """Train to the end; afterwards `model` has the selected epoch's weights."""
        state = self.state
        if state.epoch == 0:
            self.model.train()
            with self._foreign():
                self.plan.defense.prepare(self.model, next(self._images(0))[0])
        while state.epoch < self.recipe.epochs and not self._out_of_patience():
            self._train_epoch()
            self._save()
            last = state.history[-1]
            self._notify(self._report(self.steps, last["loss"], last["learning_rate"], epoch_done=True))
        if self.recipe.selection == "validation":
            if not state.best:
                raise UserError(
                    f"training {self.plan.name!r}: no epoch has a finite validation score; "
                    f"lower the learning rate (--set recipe.learning_rate=...) under another --name"
                )
            self.model.load_state_dict(state.best)

    def _foreign(self) -> AbstractContextManager[None]:
        """For calls of the defense and the model, which may be of another package."""
        step = (
            "correct the defense or the architecture, or ask for less at once (--set recipe.batch_size=...)"
        )
        return foreign_code(f"training {self.plan.name!r}", step)

    def _save(self) -> None:
        """Write the checkpoint; `UserError` when the folder of the last one was removed or replaced."""
        if self._place is not None:
            self._place.require()
        checkpoint.save(self.plan.checkpoint, self.plan.identity, self.state)
        self._place = self._place or Place.of(self.plan.checkpoint.parent)

    def finish(self) -> None:
        """Write the zoo folder of the finished training."""
        if self._place is not None:
            self._place.require()
        _write_folder(self.plan, self)

    def _out_of_patience(self) -> bool:
        patience, state = self.recipe.patience, self.state
        return patience is not None and state.best_epoch > 0 and state.epoch - state.best_epoch >= patience

    def _train_epoch(self) -> None:
        """Train and score one epoch; `state` is updated when both are done."""
        state, seed = self.state, self.plan.request.seed
        started, before, epoch = time.perf_counter(), state.seconds, state.epoch
        self.plan.defense.strength = min(1.0, (epoch + 1) / max(self.recipe.budget_warmup_epochs, 1))
        noise = generator_for(seed, epoch, "defense")
        total, seen, rate = 0.0, 0, 0.0
        with torch.random.fork_rng(devices=[self.plan.device] if self.plan.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(seed, epoch, "modules"))  # dropout draws from the global generator
            for step, (x, y) in enumerate(self._images(epoch)):
                rate = self._rate(epoch, step)
                total += self._step(x, y, noise, rate, epoch, step) * len(x)
                seen += len(x)
                state.seconds = before + time.perf_counter() - started
                self._notify(self._report(step + 1, total / seen, rate))
        score = self._score(epoch)
        state.epoch = epoch + 1
        state.seconds = before + time.perf_counter() - started
        state.model, state.optimizer = self.model.state_dict(), self.optimization.state_dict()
        record = {"epoch": float(epoch + 1), "loss": total / seen, "learning_rate": rate}
        state.history.append(record if score is None else {**record, "score": score})
        if score is not None:
            self._keep_best(score)

    def _rate(self, epoch: int, step: int) -> float:
        if self.plan.defense.keeps_rate:
            return self.recipe.learning_rate
        return learning_rate(self.recipe, epoch, epoch * self.steps + step, self.steps)

    def _step(
        self, x: Tensor, y: Tensor, noise: torch.Generator, rate: float, epoch: int, step: int
    ) -> float:
        self.model.train()
        with self._foreign():
            value = self.optimization.step(x, y, noise, rate, epoch)
        check_stop()
        if not abs(value) < float("inf"):
            raise self._not_finite(value, epoch, step)
        return value

    def _not_finite(self, value: float, epoch: int, step: int) -> UserError:
        kept = (
            f"the checkpoint of epoch {epoch} is kept at {self.plan.checkpoint}"
            if epoch
            else "no epoch was finished"
        )
        return UserError(
            f"training {self.plan.name!r}: the loss is {value} at epoch {epoch + 1}, step {step + 1}; "
            f"{kept}; lower the learning rate (--set recipe.learning_rate=...) under another --name"
        )

    def _score(self, epoch: int) -> float | None:
        last = epoch + 1 == self.recipe.epochs
        if self.recipe.selection == "last" or ((epoch + 1) % self.recipe.validate_every and not last):
            return None
        plan = self.plan
        with self._foreign():
            return selection.score(plan.defense, self.model, plan.scored, plan.device)

    def _keep_best(self, score: float) -> None:
        """Keep the epoch when it is at least as good as the best, so that on a tie the later one is kept."""
        state = self.state
        signed = selection.sign(self.plan.defense.criterion) * score
        if signed >= state.best_score:
            state.best_score, state.best_epoch = signed, state.epoch
            state.best = {name: value.detach().clone() for name, value in state.model.items()}

    def _batches(self, epoch: int) -> list[Tensor]:
        """Positions of every batch of an epoch. A last batch of a single image is left out, since batch norm has no
        statistics of one value."""
        order = torch.randperm(
            len(self.plan.train), generator=generator_for(self.plan.request.seed, epoch, "shuffle")
        )
        return [
            part for part in torch.split(order, self.recipe.batch_size) if len(part) > 1 or len(order) == 1
        ]

    def _images(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of an epoch on the device: x [B,C,H,W] in [0,1], y [B]."""
        generator = generator_for(self.plan.request.seed, epoch, "augmentation")
        for part in self._batches(epoch):
            x = augment(self.plan.train.x(part), self.recipe.augmentation, generator)
            yield x.to(self.plan.device), self.plan.train.labels[part].to(self.plan.device)

    def _report(self, step: int, loss: float, rate: float, epoch_done: bool = False) -> Report:
        state = self.state
        scores = [record["score"] for record in state.history if "score" in record]
        criterion = self.plan.defense.criterion
        return Report(
            epoch=state.epoch if epoch_done else state.epoch + 1,
            epochs=self.recipe.epochs,
            step=step,
            steps=self.steps,
            loss=loss,
            learning_rate=rate,
            criterion=criterion,
            score=scores[-1] if scores else None,
            best=selection.sign(criterion) * state.best_score if state.best_epoch else None,
            best_epoch=state.best_epoch,
            seconds=state.seconds,
            epoch_done=epoch_done,
        )


def _write_folder(plan: Plan, trainer: Trainer) -> None:
    dataset = plan.dataset
    card = {
        "name": plan.name,
        "kind": plan.kind,
        "description": f"{plan.architecture.name} on {dataset.name}, defense {plan.request.defense}",
        "dataset": plan.request.dataset,
        "defense": plan.request.defense,
        "architecture": plan.architecture,
        "input_shape": dataset.shape,
        "classes": dataset.classes if plan.kind == "classifier" else None,
        "grey_levels": dataset.grey_levels,
        "training": _training_record(plan, trainer.state),
        "measurements": _measurements(plan, trainer.model),
    }
    golden = plan.validation.x(torch.arange(min(GOLDEN_IMAGES, len(plan.validation))))
    save_model_folder(plan.folder, card, trainer.model, golden)


def _measurements(plan: Plan, model: nn.Module) -> tuple[Measurement, ...]:
    command = plan.request.command
    if plan.kind == "flow":
        return selection.flow_measurements(
            cast(Flow, model), plan.dataset, plan.train, plan.validation, plan.device, command, plan.about
        )
    return selection.classifier_measurements(
        model, plan.validation, plan.defense.criterion, plan.setting, plan.device, command, plan.about
    )


def _training_record(plan: Plan, state: Progress) -> Training:
    validated = plan.recipe.selection == "validation"
    return Training(
        command=plan.request.command,
        seed=plan.request.seed,
        recipe=plan.recipe.name,
        parameters={"defense": plan.defense.parameters.model_dump(mode="json"), "recipe": plan.schedule},
        train_samples=len(plan.train),
        validation_samples=len(plan.scored) if plan.holds_out else 0,
        epochs=state.epoch,
        selected_epoch=state.best_epoch if validated else state.epoch,
        selection=f"best {plan.defense.criterion} on validation" if validated else "last epoch",
        flow=plan.flow,
        versions={
            "python": platform.python_version(),
            "robbench": __version__,
            **{package: version(package) for package in ("torch", "numpy")},
            "device": plan.device.type,
            "threads": str(torch.get_num_threads()),  # bit-identical retraining needs the same number
        },
        minutes=round(state.seconds / 60, 2),
        note="; ".join(filter(None, (plan.defense.note, plan.request.note))),
    )
