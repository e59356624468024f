"""The contract of every attack: a subclass searches, the base class owns the truth.

The base class scores the clean image, hands the samples to the search, then checks every returned example itself
(shape, dtype, NaN, box, ball; for latent and joint attacks by decoding the witness again), removes rounding, and
re-scores it with a clean fp32 forward. An attack's own success flag never counts. What looks suspicious on the way
(`suspicions`) is written down and changes no verdict.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from robbench.attacks.checks import (
    BALL_TOLERANCE,
    BOX_TOLERANCE,
    check_tensor,
    inside_ball,
    inside_box,
    require,
    require_image_budget,
    require_latent_budget,
)
from robbench.attacks.codec import FlowCodec, decoded_image, probe_flow, regrouped
from robbench.attacks.named import ATTACKS, NamedAttack
from robbench.attacks.search.decision import losses, margins, predictions
from robbench.attacks.search.geometry import norm_of
from robbench.attacks.search.inner import attacked
from robbench.attacks.search.spaces import Codec
from robbench.attacks.trust.audit import SearchAudit, Searched, check_afterwards
from robbench.attacks.trust.context import own_context, refuse_inference_tensors
from robbench.attacks.trust.model_call import out_of_memory
from robbench.attacks.trust.model_state import ModelState
from robbench.attacks.trust.preflight import check_model
from robbench.attacks.trust.suspicions import PROBED, Diagnostics, Suspicion, diagnose, zero_gradients
from robbench.attacks.victim import Victim, full_precision
from robbench.core.errors import AttackViolation, UserError
from robbench.models.flows.base import Flow, FrozenFlow
from robbench.specs import ModelKind, ResolvedAttack

WITNESS_TOLERANCE = 1e-4  # rounding allowance of an image decoded again from its witness, on [0,1] pixels


@dataclass
class Candidates:
    """What a search returns, on any device, N rows in the order it was given.

    adversarial: [N,C,H,W]. witness: tensors from which a latent or joint example is decoded again ("lambda" [N,D],
    "delta" [N,C,H,W]). step: gradient steps or queries used when the search believed it succeeded, else -1.
    component: name of the part of an ensemble that found it. forwards, backwards: calls of the model, [N].
    diagnostics: what the search saw on the way. claimed: [N] bool, a forward of the search found `adversarial`
    misclassified; None where the search does not say.
    """

    adversarial: Tensor
    step: Tensor
    forwards: Tensor
    backwards: Tensor
    component: list[str]
    witness: dict[str, Tensor] = field(default_factory=dict)
    counts_exact: bool = True
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    claimed: Tensor | None = None


@dataclass
class Outcome:
    """Verified result of an attack; all tensors on the CPU, N rows in the order asked. See the ledger for units.

    diagnostics: counts that may give away a model that is hard to attack for the wrong reasons.
    """

    sample_ids: Tensor
    labels: Tensor
    clean_predictions: Tensor
    clean_margins: Tensor
    predictions: Tensor
    margins: Tensor
    robust: Tensor
    broken_by: list[str | None]
    broken_at: Tensor
    l1: Tensor
    l2: Tensor
    linf: Tensor
    cross_entropy: Tensor
    forwards: Tensor
    backwards: Tensor
    counts_exact: bool
    adversarial: Tensor
    witness: dict[str, Tensor]
    diagnostics: Diagnostics = field(default_factory=Diagnostics)

    @property
    def under_attack(self) -> Tensor:
        """Whether each sample is right on its attacked image, [N] bool: accuracy under attack counts these."""
        return self.margins > 0  # a tie is not a right answer

    @property
    def suspicions(self) -> tuple[Suspicion, ...]:
        """What to know besides the verdicts, from `diagnostics`."""
        return self.diagnostics.suspicions


@dataclass(frozen=True)
class Task:
    """The samples handed to a search, on the victim's device. `clean_predictions` as scored by the base class."""

    ids: Tensor
    x: Tensor
    y: Tensor
    clean_predictions: Tensor
    seed: int
    batch_size: int


class Attack(NamedAttack):
    """Base class of all attacks on classifiers. Subclasses set `Parameters` and implement `search` and `cost`."""

    target: ClassVar[ModelKind] = "classifier"

    def __init__(self, spec: ResolvedAttack, flow: Codec | None = None) -> None:
        if spec.needs_flow and flow is None:
            raise UserError(
                f"attack {spec.name!r} searches the latents of a normalizing flow and none is at hand; "
                f"name one with --flow, or train one: robbench train --defense clean --dataset NAME"
            )
        super().__init__(spec)
        self.flow = flow

    @abstractmethod
    def search(self, victim: Victim, task: Task) -> Candidates:
        """Look for adversarial examples of every sample of `task`."""

    @property
    def attacks_misclassified(self) -> bool:
        """Whether samples the clean model gets wrong are attacked too, as by all perturbations; they are not robust."""
        return self.spec.semantics == "perturbation"

    @property
    def verdict_forwards(self) -> int:
        """Forwards averaged for every verdict; more than one only in attacks for randomised models."""
        return 1

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0, batch_size: int = 256
    ) -> Tensor:
        """Adversarial examples [N,C,H,W] for images x in [0,1] and labels y [N], on x's device.

        Sample i is keyed by its position i. The model's modes and flags are as before afterwards.
        """
        outcome = self.evaluate(
            Victim(model, x.device, batch_size), torch.arange(len(x)), x, y, seed=seed, batch_size=batch_size
        )
        return outcome.adversarial.to(x.device)

    def evaluate(
        self, victim: Victim, sample_ids: Tensor, x: Tensor, y: Tensor, seed: int, batch_size: int
    ) -> Outcome:
        """Attack the samples, verify and re-score.

        Where memory does not hold a batch, its size is halved and the call begins again, as often as it takes; results
        do not depend on it. Attacks whose results do (`batch_dependent`) fail instead. Raises `AttackViolation` when an
        example leaves its set, `UserError` for inputs and models that cannot be attacked so.
        """
        with own_context():
            x, y = _checked_inputs(x, y)
            require_image_budget(self.spec, x)
            return self._within_memory(
                victim, _checked_ids(sample_ids, len(x)), x, y, _checked_seed(seed), batch_size
            )

    def _within_memory(
        self, victim: Victim, sample_ids: Tensor, x: Tensor, y: Tensor, seed: int, batch_size: int
    ) -> Outcome:
        size = batch_size if self.batch_dependent else min(batch_size, victim.fits or batch_size)
        largest = min(max(size, victim.batch_size), len(x))  # of all batches: scoring has a size of its own
        halved = Diagnostics()
        while True:
            try:
                outcome = self._evaluated(victim, sample_ids, x, y, seed, size)
                break
            except (RuntimeError, MemoryError) as error:
                if self.batch_dependent or largest <= 1 or not out_of_memory(error):
                    raise
            # Outside the handler: the exception would keep the failed attempt's tensors alive.
            halved += Diagnostics(batch_asked=largest, batch_fits=largest // 2)
            largest //= 2
            size = min(size, largest)
            victim.use_batches_of(largest)
        outcome.diagnostics += halved
        return outcome

    def _evaluated(
        self, victim: Victim, sample_ids: Tensor, x: Tensor, y: Tensor, seed: int, batch_size: int
    ) -> Outcome:
        refuse_inference_tensors(victim.module)
        with attacked(victim.module), full_precision():
            victim.draws = self.verdict_forwards
            passed, state, audit = check_model(victim, x), ModelState.of(victim.module), SearchAudit()
            few = slice(victim.batch_size)
            flow = probe_flow(self.flow, x[few], y[few], victim.device, gradient=self.cost.backwards > 0)
            clean = victim.clean_logits(x)
            _require_labels(y, clean.shape[1])
            alive = self._to_search(clean, y)
            some = alive.nonzero().squeeze(1)[: min(32, victim.batch_size)]
            if len(some):
                require_latent_budget(
                    self.spec, self.flow, x[some].to(victim.device), y[some].to(victim.device)
                )
            with victim.searched_leanly(x), victim.audited(audit):
                probed = self._probed(victim, x[alive], y[alive], batch_size)
                found = self._searched(victim, alive, sample_ids, x, y, clean.argmax(1), seed, batch_size)
            adversarial = self._verified(victim, sample_ids, x, y, found, alive)
            if flow is not None:
                flow.repeat()
            logits = victim.attacked_logits(adversarial, y)
            claimed = _claimed(found, adversarial)
            searched = Searched(x, adversarial, y, clean, logits, claimed)
            rescored = check_afterwards(victim, state, passed, audit, searched)
        outcome = self._outcome(sample_ids, x, y, clean, rescored.logits, adversarial, found)
        seen = diagnose(self.spec, y, clean, rescored.logits, outcome.robust, outcome.broken_by, alive)
        gaps = Diagnostics(batch_gap=max(passed.gap, rescored.gap), batch_flips=rescored.flips)
        outcome.diagnostics = seen + probed + found.diagnostics + gaps
        return outcome

    def _to_search(self, clean: Tensor, y: Tensor) -> Tensor:
        """True [N] for samples with clean logits [N,K] that the search is to see."""
        if self.spec.bounded and not (self.spec.epsilon or self.spec.eta):
            return torch.zeros_like(y, dtype=torch.bool)
        return torch.ones_like(y, dtype=torch.bool) if self.attacks_misclassified else margins(clean, y) > 0

    def _probed(self, victim: Victim, x: Tensor, y: Tensor, batch_size: int) -> Diagnostics:
        """Whether gradients exist and do not vanish, on the first of the samples to search; not counted as calls.

        `UserError` where the attack needs gradients and the model is not differentiable.
        """
        if not len(x) or not self.cost.backwards:
            return Diagnostics()
        few = slice(min(PROBED, batch_size))
        try:
            slope = victim.loss_gradient(x[few].to(victim.device), y[few].to(victim.device))
        except (RuntimeError, UserError) as error:
            if out_of_memory(error):
                raise
            reason = " ".join(str(error.__cause__ or error).split())[:120]
            square = f"square-{self.spec.norm}" if self.spec.norm in ("l1", "l2") else "square"
            raise UserError(
                f"attack {self.spec.label!r} follows the gradient of the model, which has none ({reason}); make its "
                f"forward differentiable (no torch.no_grad or argmax inside), or use {square}, which needs no gradient"
            ) from error
        return Diagnostics(probed=len(slope), zero_gradients=int(zero_gradients(slope).sum()))

    def _searched(
        self,
        victim: Victim,
        alive: Tensor,
        sample_ids: Tensor,
        x: Tensor,
        y: Tensor,
        predictions: Tensor,
        seed: int,
        batch_size: int,
    ) -> Candidates:
        """`search` on the living rows, spread over all rows; rows not attacked keep their clean image."""
        n = len(x)
        zeros = torch.zeros(n, dtype=torch.int64)
        full = Candidates(x.clone(), zeros - 1, zeros + victim.draws, zeros.clone(), [self.spec.name] * n)
        full.claimed = torch.zeros(n, dtype=torch.bool)
        rows = alive.nonzero().squeeze(1)
        if not len(rows):
            return full
        device = victim.device
        task = Task(
            sample_ids[rows],
            x[rows].to(device),
            y[rows].to(device),
            predictions[rows].to(device),
            seed,
            batch_size,
        )
        part = self.search(victim, task)
        check_tensor(self.spec, part.adversarial, task.x, sample_ids[rows])
        full.adversarial[rows] = part.adversarial.detach().cpu()
        full.step[rows] = part.step.cpu()
        full.forwards[rows] += part.forwards.cpu() + victim.draws * victim.verdicts
        full.backwards[rows] += part.backwards.cpu()
        full.counts_exact, full.diagnostics = part.counts_exact, part.diagnostics
        if part.claimed is not None:
            full.claimed[rows] = part.claimed.cpu()
        for row, name in zip(rows.tolist(), part.component, strict=True):
            full.component[row] = name
        for name, value in part.witness.items():
            full.witness[name] = torch.zeros((n, *value.shape[1:]))
            full.witness[name][rows] = value.detach().float().cpu()
        return full

    def _verified(
        self, victim: Victim, ids: Tensor, x: Tensor, y: Tensor, found: Candidates, alive: Tensor
    ) -> Tensor:
        """Examples inside box and ball, rounding removed; `AttackViolation` for anything beyond rounding."""
        adversarial = inside_box(self.spec, ids, found.adversarial)
        if self.spec.space == "image":
            return inside_ball(self.spec, ids, x, adversarial)
        if not self.spec.bounded:
            return adversarial
        if found.witness:
            self.check_witness(victim, ids, x, y, adversarial, found.witness, alive)
        elif not torch.equal(adversarial, x):
            raise AttackViolation(
                f"attack {self.spec.label!r} returned no witness for its latent perturbation"
            )
        return adversarial

    def check_witness(
        self,
        victim: Victim,
        ids: Tensor,
        x: Tensor,
        y: Tensor,
        adversarial: Tensor,
        witness: dict[str, Tensor],
        alive: Tensor,
    ) -> None:
        """Ball of every witness, and the example decoded from it again."""
        assert self.flow is not None
        norms = {"lambda": ("linf" if self.spec.space == "joint" else self.spec.norm), "delta": "linf"}
        radii = {"lambda": self.spec.eta, "delta": self.spec.epsilon}
        for name, value in witness.items():
            radius = float(radii[name] or 0.0)
            if norms[name] != "none":
                size = norm_of(value, norms[name])
                require(
                    self.spec,
                    ids,
                    size[:, None],
                    radius,
                    BALL_TOLERANCE * max(1.0, radius),
                    f"budget of {name}",
                )
        levels = getattr(self.parameters, "levels", None)
        if levels is not None:
            outside = witness["lambda"].abs() * (1.0 - self.flow.level_mask(levels))
            require(self.spec, ids, outside, 0.0, 0.0, f"levels {list(levels)} of the flow")
        for rows in regrouped(alive.nonzero().squeeze(1), victim.batch_size):
            device = victim.device
            own = {name: value[rows].to(device) for name, value in witness.items()}
            again = decoded_image(self.flow, x[rows].to(device), y[rows].to(device), own)
            gap = (again.cpu() - adversarial[rows]).abs()
            require(
                self.spec, ids[rows], gap.flatten(1), 0.0, WITNESS_TOLERANCE, "image decoded from its witness"
            )

    def _outcome(
        self,
        ids: Tensor,
        x: Tensor,
        y: Tensor,
        clean: Tensor,
        logits: Tensor,
        adversarial: Tensor,
        found: Candidates,
    ) -> Outcome:
        clean_right = margins(clean, y) > 0  # a tie is not a right answer
        robust = clean_right & (margins(logits, y) > 0)
        broken_by = [
            None if held else ("clean" if not right else name)
            for held, right, name in zip(robust.tolist(), clean_right.tolist(), found.component, strict=True)
        ]
        step = torch.where(robust, torch.full_like(found.step, -1), found.step)
        step = torch.where(clean_right | robust, step, torch.zeros_like(step))
        difference = adversarial - x
        return Outcome(
            sample_ids=ids.clone(),
            labels=y,
            clean_predictions=clean.argmax(1),
            clean_margins=margins(clean, y),
            predictions=predictions(logits),
            margins=margins(logits, y),
            robust=robust,
            broken_by=broken_by,
            broken_at=step,
            l1=norm_of(difference, "l1"),
            l2=norm_of(difference, "l2"),
            linf=norm_of(difference, "linf"),
            cross_entropy=losses(logits, y),
            forwards=found.forwards,
            backwards=found.backwards,
            counts_exact=found.counts_exact,
            adversarial=adversarial,
            witness=found.witness,
        )


def _claimed(found: Candidates, adversarial: Tensor) -> Tensor:
    """Rows that the search found misclassified and whose image [N,C,H,W] is still the one it found, [N] bool."""
    same = (found.adversarial == adversarial).flatten(1).all(1)
    return same if found.claimed is None else same & found.claimed


def _checked_inputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """CPU float32 images and int64 labels; `UserError` when images leave [0,1], labels are no integers, or shapes
    disagree. Excess over [0,1] within `BOX_TOLERANCE` is rounding and is clipped."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(
            f"labels are {y.dtype}; give integer class numbers 0, 1, ... as torch.int64 (y.long(), once they are whole "
            f"numbers)"
        )
    if not x.is_floating_point():
        raise UserError(
            f"images are {x.dtype}; give floating point pixels in [0,1] (of 8-bit images: x.float() / 255)"
        )
    if x.ndim != 4 or y.shape != (len(x),):
        raise UserError(
            f"images {tuple(x.shape)} with labels {tuple(y.shape)}: give [N,C,H,W] images and [N] labels"
        )
    # Tensors made in inference mode cannot be saved for a backward pass; copies made outside of it can.
    x, y = (values.clone() if values.is_inference() else values.detach() for values in (x, y))
    x, y = x.to("cpu", torch.float32).contiguous(), y.to("cpu", torch.int64)
    if not len(x):
        return x, y
    low, high = float(x.min()), float(x.max())
    if not (low >= -BOX_TOLERANCE and high <= 1.0 + BOX_TOLERANCE):
        raise UserError(
            f"images span [{low:.9g}, {high:.9g}], beyond [0,1] by {max(-low, high - 1.0):.3g}; give pixels in [0,1] "
            f"and put the normalisation inside the model"
        )
    return (x if low >= 0.0 and high <= 1.0 else x.clamp(0.0, 1.0)), y


def _checked_ids(ids: Tensor, n: int) -> Tensor:
    """Sample ids [n], which key every random number."""
    if ids.dtype != torch.int64 or ids.shape != (n,) or len(set(ids.tolist())) != n:
        raise UserError(
            f"sample_ids are {ids.dtype} {tuple(ids.shape)} for {n} images; give one int64 id per image, all different"
        )
    return ids.cpu()


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed={seed!r}; give an integer of at least 0")
    return seed


def _require_labels(y: Tensor, classes: int) -> None:
    outside = y[(y < 0) | (y >= classes)]
    if len(outside):
        raise UserError(f"label {int(outside[0])} is outside the model's {classes} classes; check --dataset")


def build_attack(spec: ResolvedAttack, flow: Flow | FrozenFlow | None = None) -> Attack:
    """The attack on classifiers that a spec describes; `UserError` for unknown algorithms, parameters, a missing flow,
    and for attacks on a flow's likelihood."""
    found = ATTACKS.get(spec.algorithm)
    if not issubclass(found, Attack):
        raise UserError(
            f"attack {spec.name!r} changes the likelihood of a flow, not the decision of a classifier; "
            f"name an attack on classifiers (robbench list attacks)"
        )
    return found(spec, FlowCodec(flow) if flow is not None and spec.needs_flow else None)
