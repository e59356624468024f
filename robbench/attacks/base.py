"""The contract of every attack: a subclass searches for adversarial examples, the base class decides the verdicts.

The base class scores the clean images, runs the search, then checks every returned example itself (shape, dtype, NaN,
box, ball; for latent and joint attacks by decoding the witness again), removes rounding, and re-scores it with a clean
fp32 forward. An attack's own success flag never counts. Signs of masked gradients and the like are recorded
(`Outcome.suspicions`) and change no verdict.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from robbench.attacks.checks import (
    BALL_TOLERANCE,
    check_ids,
    check_inputs,
    check_seed,
    check_tensor,
    inside_ball,
    inside_box,
    require,
    require_image_budget,
    require_labels,
    require_latent_budget,
)
from robbench.attacks.codec import FlowCodec, FlowProbe, decode_and_check, probe_flow, regroup
from robbench.attacks.named import ATTACKS, NamedAttack
from robbench.attacks.outcome import Outcome
from robbench.attacks.search.decision import losses, margins, predictions
from robbench.attacks.search.geometry import norm_of
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.search.progress import tell
from robbench.attacks.search.spaces import Codec
from robbench.attacks.search.task import Candidates, Samples, SearchSettings, Task
from robbench.attacks.trust.audit import SearchAudit, Searched, check_afterwards
from robbench.attacks.trust.context import full_precision, own_context, refuse_inference_tensors
from robbench.attacks.trust.diagnosis import PROBED, diagnose, zero_gradients
from robbench.attacks.trust.model_call import out_of_memory
from robbench.attacks.trust.preflight import check_model
from robbench.attacks.trust.search_guard import (
    nothing_else_changed,
    require_candidates,
    require_counts,
    steps_of,
)
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.attacks.victim import Victim
from robbench.core.errors import AttackViolation, UserError, spell_argument
from robbench.models.flows.base import Flow, FrozenFlow
from robbench.models.state import ModelState
from robbench.specs import ModelKind, ResolvedAttack

__all__ = ["Attack", "Candidates", "Outcome", "Task", "build_attack"]
BUDGET_IMAGES = 32  # images at most whose latents a latent budget is compared with
WITNESS_TOLERANCE = 1e-4  # rounding allowance of an image decoded again from its witness, on [0,1] pixels


class Attack(NamedAttack):
    """Base class of all attacks on classifiers. Subclasses set `Parameters` and implement `search` and `cost`."""

    target: ClassVar[ModelKind] = "classifier"
    judging = (
        "evaluate",
        "_within_memory",
        "_attempt",
        "_search_rows",
        "_verify",
        "check_witness",
        "_outcome",
    )

    def __init__(self, spec: ResolvedAttack, flow: Codec | None = None) -> None:
        if spec.needs_flow and flow is None:
            raise UserError(
                f"attack {spec.name!r} searches the latents of a normalizing flow and none is at hand; "
                f"name one with {spell_argument('flow')}, or train one: robbench train --defense clean --dataset NAME"
            )
        super().__init__(spec)
        self.flow = flow

    @abstractmethod
    def search(self, victim: Victim, task: Task) -> Candidates:
        """Search for an adversarial example of every sample of `task`."""

    @property
    def attacks_misclassified(self) -> bool:
        """Whether samples whose clean image is misclassified are attacked too (they never count as robust)."""
        return self.spec.semantics == "perturbation"

    @property
    def raises_cross_entropy(self) -> bool:
        """Whether the image returned for a robust sample is an iterate of ascent on the cross-entropy."""
        return False

    @property
    def verdict_forwards(self) -> int:
        """Forwards averaged for every verdict; more than one only in attacks on randomised models."""
        return 1

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0, batch_size: int = 256
    ) -> Tensor:
        """Adversarial examples [N,C,H,W] for images x in [0,1] and labels y [N], on x's device.

        Random numbers are keyed by the position in the batch. The model's modes and flags are restored afterwards.
        """
        outcome = self.evaluate(
            Victim(model, x.device, batch_size), torch.arange(len(x)), x, y, seed=seed, batch_size=batch_size
        )
        return outcome.adversarial.to(x.device)

    def evaluate(
        self, victim: Victim, sample_ids: Tensor, x: Tensor, y: Tensor, seed: int, batch_size: int
    ) -> Outcome:
        """Attack the samples, verify and re-score.

        When memory runs out, the batch size is halved and the call starts again, as often as necessary; results do not
        depend on the batch size, and attacks whose results do (`batch_dependent`) fail instead. Raises
        `AttackViolation` when an example leaves its set, `UserError` for inputs and models that cannot be attacked.
        """
        with own_context():
            x, y = check_inputs(x, y)
            require_image_budget(self.spec, x)
            samples = Samples(check_ids(sample_ids, len(x)), x, y)
            return self._within_memory(victim, samples, SearchSettings(check_seed(seed), batch_size))

    def _within_memory(self, victim: Victim, samples: Samples, settings: SearchSettings) -> Outcome:
        size = (
            settings.batch_size
            if self.batch_dependent
            else min(settings.batch_size, victim.fits or settings.batch_size)
        )
        largest = min(max(size, victim.batch_size), len(samples.x))  # scoring has a batch size of its own
        halved = Diagnostics()
        while True:
            try:
                outcome = self._attempt(victim, samples, replace(settings, batch_size=size))
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

    def _attempt(self, victim: Victim, samples: Samples, settings: SearchSettings) -> Outcome:
        """One attempt: check the model and the flow, search, verify, score and check again."""
        refuse_inference_tensors(victim.module)
        with attack_mode(victim.module), full_precision():
            victim.draws = self.verdict_forwards
            passed, state, audit = check_model(victim, samples.x), ModelState.of(victim.module), SearchAudit()
            flow = self._check_flow(victim, samples)
            clean = victim.clean_logits(samples.x)
            require_labels(samples.y, clean.shape[1])
            alive = self._to_search(clean, samples.y)
            self._require_latent_budget(victim, samples, alive)
            with victim.lean_search(samples.x), victim.audit_forwards(audit):
                probed = self._probe_gradients(victim, samples, alive, settings)
                found = self._search_rows(victim, samples, alive, clean.argmax(1), settings)
            require_counts(self.spec, found, audit.images)
            adversarial, decoded = self._verify(victim, samples, found, alive)
            if flow is not None:
                flow.repeat()
            logits = victim.attacked_logits(adversarial, samples.y)
            claimed = _match_claims(found, adversarial)
            searched = Searched(samples.x, adversarial, samples.y, clean, logits, claimed)
            rescored = check_afterwards(victim, state, passed, audit, searched)
        outcome = self._outcome(samples, clean, rescored.logits, adversarial, found)
        gaps = Diagnostics(batch_gap=max(passed.gap, rescored.gap), batch_flips=rescored.flips)
        seen = diagnose(
            self.spec,
            self.raises_cross_entropy,
            clean,
            rescored.logits,
            outcome.labels,
            outcome.robust,
            outcome.broken_by,
            alive,
        )
        outcome.diagnostics = seen + probed + found.diagnostics + gaps + rescored.slopes + decoded
        return outcome

    def _check_flow(self, victim: Victim, samples: Samples) -> FlowProbe | None:
        few = slice(victim.batch_size)
        gradient = self.cost.backwards > 0
        return probe_flow(self.flow, samples.x[few], samples.y[few], victim.device, gradient)

    def _require_latent_budget(self, victim: Victim, samples: Samples, alive: Tensor) -> None:
        """`require_latent_budget` on the first of the images to search."""
        rows = alive.nonzero().squeeze(1)[: min(BUDGET_IMAGES, victim.batch_size)]
        if len(rows):
            x, y = samples.x[rows].to(victim.device), samples.y[rows].to(victim.device)
            require_latent_budget(self.spec, self.flow, x, y)

    def _to_search(self, clean: Tensor, y: Tensor) -> Tensor:
        """Which samples with clean logits [N,K] are searched, [N] bool."""
        if self.spec.bounded and not (self.spec.epsilon or self.spec.eta):
            return torch.zeros_like(y, dtype=torch.bool)
        return torch.ones_like(y, dtype=torch.bool) if self.attacks_misclassified else margins(clean, y) > 0

    def _probe_gradients(
        self, victim: Victim, samples: Samples, alive: Tensor, settings: SearchSettings
    ) -> Diagnostics:
        """Check on the first samples to search that gradients exist and do not vanish; these calls are not counted.

        `UserError` where the attack needs gradients and the model is not differentiable.
        """
        rows = alive.nonzero().squeeze(1)[: min(PROBED, settings.batch_size)]
        if not len(rows) or not self.cost.backwards:
            return Diagnostics()
        try:
            gradient = victim.loss_gradient(
                samples.x[rows].to(victim.device), samples.y[rows].to(victim.device)
            )
        except (RuntimeError, UserError) as error:
            if out_of_memory(error):
                raise
            reason = " ".join(str(error.__cause__ or error).split())[:120]
            square = f"square-{self.spec.norm}" if self.spec.norm in ("l1", "l2") else "square"
            raise UserError(
                f"attack {self.spec.label!r} follows the gradient of the model, which has none ({reason}); make its "
                f"forward differentiable (no torch.no_grad or argmax inside), or use {square}, which needs no gradient"
            ) from error
        return Diagnostics(probed=len(gradient), zero_gradients=int(zero_gradients(gradient).sum()))

    def _search_rows(
        self,
        victim: Victim,
        samples: Samples,
        alive: Tensor,
        clean_predictions: Tensor,
        settings: SearchSettings,
    ) -> Candidates:
        """`search` on the rows `alive` [N] bool, spread over all rows; the others keep their clean image."""
        full = Candidates.unsearched(samples.x, self.spec.name)
        full.forwards += victim.draws
        full.claimed = torch.zeros_like(alive)
        rows = alive.nonzero().squeeze(1)
        tell(done=len(alive) - len(rows))
        if len(rows):
            x, y, clean = (t[rows].to(victim.device) for t in (samples.x, samples.y, clean_predictions))
            task = Task(samples.ids[rows], x, y, clean, settings.seed, settings.batch_size)
            with nothing_else_changed(self, victim):
                part = require_candidates(self.spec, self.search(victim, task), len(rows))
            check_tensor(self.spec, part.adversarial, task.x, task.ids)
            full.forwards[rows] += victim.draws * victim.verdicts
            full.take(part, rows)
        return full

    def _verify(
        self, victim: Victim, samples: Samples, found: Candidates, alive: Tensor
    ) -> tuple[Tensor, Diagnostics]:
        """Examples inside box and ball, rounding removed; `AttackViolation` for anything beyond rounding."""
        ids, x = samples.ids, samples.x
        adversarial = inside_box(self.spec, ids, found.adversarial)
        if self.spec.space == "image":
            return inside_ball(self.spec, ids, x, adversarial), Diagnostics()
        if self.spec.bounded and found.witness:
            seen = self.check_witness(victim, ids, x, samples.y, adversarial, found.witness, alive)
            return adversarial, seen
        if self.spec.bounded and not torch.equal(adversarial, x):
            raise AttackViolation(
                f"attack {self.spec.label!r} returned no witness for its latent perturbation"
            )
        return adversarial, Diagnostics()

    def check_witness(
        self,
        victim: Victim,
        ids: Tensor,
        x: Tensor,
        y: Tensor,
        adversarial: Tensor,
        witness: dict[str, Tensor],
        alive: Tensor,
    ) -> Diagnostics:
        """Require every witness inside its ball, and `adversarial` equal to the image decoded from it again.

        Returns how many images, encoded, are far from the latents they were decoded from.
        """
        assert self.flow is not None
        far = 0
        self._check_latent_ball(ids, witness)
        for rows in regroup(alive.nonzero().squeeze(1), victim.batch_size):
            device = victim.device
            own = {name: value[rows].to(device) for name, value in witness.items()}
            again, same = decode_and_check(self.flow, x[rows].to(device), y[rows].to(device), own)
            gap = (again.cpu() - adversarial[rows]).abs().flatten(1)
            require(self.spec, ids[rows], gap, 0.0, WITNESS_TOLERANCE, "image decoded from its witness")
            far += int((~same()).sum())
        return Diagnostics(decoded=int(alive.sum()), misplaced=far)

    def _check_latent_ball(self, ids: Tensor, witness: dict[str, Tensor]) -> None:
        assert self.flow is not None
        norms = {"lambda": ("linf" if self.spec.space == "joint" else self.spec.norm), "delta": "linf"}
        radii = {"lambda": self.spec.eta, "delta": self.spec.epsilon}
        for name, value in witness.items():
            if norms[name] != "none":
                radius = float(radii[name] or 0.0)
                size, allowance = norm_of(value, norms[name])[:, None], BALL_TOLERANCE * max(1.0, radius)
                require(self.spec, ids, size, radius, allowance, f"budget of {name}")
        levels = getattr(self.parameters, "levels", None)
        if levels is not None:
            outside = witness["lambda"].abs() * (1.0 - self.flow.level_mask(levels))
            require(self.spec, ids, outside, 0.0, 0.0, f"levels {list(levels)} of the flow")

    def _outcome(
        self, samples: Samples, clean: Tensor, logits: Tensor, adversarial: Tensor, found: Candidates
    ) -> Outcome:
        y = samples.y
        clean_right = margins(clean, y) > 0  # a tie is wrong
        robust = clean_right & (margins(logits, y) > 0)
        broken_by = [
            None if stays else ("clean" if not right else name)
            for stays, right, name in zip(robust.tolist(), clean_right.tolist(), found.component, strict=True)
        ]
        step = steps_of(self.spec, found, clean_right & ~robust).masked_fill(robust, -1)
        step = torch.where(clean_right | robust, step, torch.zeros_like(step))
        difference = adversarial - samples.x
        return Outcome(
            sample_ids=samples.ids.clone(),
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


def _match_claims(found: Candidates, adversarial: Tensor) -> Tensor:
    """Samples that the search found misclassified at the very image [N,C,H,W] that is scored, [N] bool."""
    same = (found.adversarial == adversarial).flatten(1).all(1)
    return same if found.claimed is None else same & found.claimed


def build_attack(spec: ResolvedAttack, flow: Flow | FrozenFlow | None = None) -> Attack:
    """The attack on classifiers that a spec describes; `UserError` for an unknown algorithm or parameter, a missing
    flow, and an attack on a flow's likelihood."""
    found = ATTACKS.get(spec.algorithm)
    if not issubclass(found, Attack):
        raise UserError(
            f"attack {spec.name!r} changes the likelihood of a flow, not the decision of a classifier; "
            f"name an attack on classifiers (robbench list attacks)"
        )
    return found(spec, FlowCodec(flow) if flow is not None and spec.needs_flow else None)
