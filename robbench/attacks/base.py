"""The contract of every attack: a subclass searches for adversarial examples, the base class decides the verdicts.

The base class scores the clean images, runs the search, then checks every returned example itself (shape, dtype, NaN,
box, ball; of a perturbation that is no shift of pixels, its constraints and the image rendered from it again), removes
rounding, and re-scores it with a clean fp32 forward. An attack's own success flag never counts. Signs of masked
gradients and the like are recorded (`Outcome.suspicions`) and change no verdict.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from robbench.attacks.checks import (
    check_ids,
    check_inputs,
    check_seed,
    check_tensor,
    inside_ball,
    inside_box,
    require,
    require_constraint,
    require_image_budget,
    require_labels,
    require_latent_budget,
)
from robbench.attacks.codec import FlowCodec, FlowProbe, probe_flow, regroup
from robbench.attacks.guard import Guard
from robbench.attacks.named import ATTACKS, NamedAttack
from robbench.attacks.outcome import Outcome
from robbench.attacks.search.decision import losses, margins, predictions
from robbench.attacks.search.geometry import SampleNoise, norm_of
from robbench.attacks.search.goals import Target, choose_targets
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.search.progress import tell
from robbench.attacks.search.spaces import Codec, SearchSpace
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


class Attack(NamedAttack):
    """Base class of all attacks on classifiers. Subclasses set `Parameters` and implement `search` and `cost`.

    guard: of an attack whose target is "detector" the detector that it must evade, set by whoever builds its cell.
    """

    target: ClassVar[ModelKind] = "classifier"
    guard: Guard | None = None
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

    def space(self) -> SearchSpace | None:
        """The set of the attack, for attacks that return a witness; None for balls of pixels, checked on the image."""
        return None

    def require_images(self, shape: tuple[int, int, int]) -> None:
        """`UserError` for images [C,H,W] of a shape that the attack cannot take."""

    @property
    def contains_clean(self) -> bool:
        """Whether the set contains the clean image, so that a budget of 0 is no attack."""
        return True

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
            self.require_images((int(x.shape[1]), int(x.shape[2]), int(x.shape[3])))
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
            targets = self._targets(clean, samples, settings.seed)
            alive = self._to_search(clean, samples.y)
            if targets is not None:
                alive &= targets != samples.y
            self._require_latent_budget(victim, samples, alive)
            with victim.lean_search(samples.x), victim.audit_forwards(audit):
                probed = self._probe_gradients(victim, samples, alive, settings)
                found = self._search_rows(victim, samples, alive, clean.argmax(1), targets, settings)
            require_counts(self.spec, found, audit.images)
            adversarial, decoded = self._verify(victim, samples, found, alive, settings.seed)
            if flow is not None:
                flow.repeat()
            logits = victim.attacked_logits(adversarial, samples.y)
            claimed = _match_claims(found, adversarial)
            searched = Searched(samples.x, adversarial, samples.y, clean, logits, claimed)
            rescored = check_afterwards(victim, state, passed, audit, searched)
        outcome = self._outcome(samples, clean, rescored.logits, adversarial, found)
        if targets is not None:
            outcome.targets = targets
            outcome.reached = (outcome.predictions == targets) & (targets != samples.y)
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

    def _targets(self, clean: Tensor, samples: Samples, seed: int) -> Tensor | None:
        """The classes [N] to reach, from clean logits [N,K]; None for an untargeted attack."""
        rule: Target | None = getattr(self.parameters, "target", None)
        return None if rule is None else choose_targets(rule, clean, samples.y, samples.ids, seed)

    def _to_search(self, clean: Tensor, y: Tensor) -> Tensor:
        """Which samples with clean logits [N,K] are searched, [N] bool."""
        if self.spec.bounded and self.contains_clean and not (self.spec.epsilon or self.spec.eta):
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
            norm, minimal = self.spec.norm, self.spec.space == "minimal"
            other = f"square-{norm}" if norm in ("l1", "l2") else "square"
            other = f"hopskipjump-{norm}" if minimal and norm in ("l2", "linf") else other
            raise UserError(
                f"attack {self.spec.label!r} follows the gradient of the model, which has none ({reason}); make its "
                f"forward differentiable (no torch.no_grad or argmax inside), or use {other}, which needs no gradient"
            ) from error
        return Diagnostics(probed=len(gradient), zero_gradients=int(zero_gradients(gradient).sum()))

    def _search_rows(
        self,
        victim: Victim,
        samples: Samples,
        alive: Tensor,
        clean_predictions: Tensor,
        targets: Tensor | None,
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
            aims = None if targets is None else targets[rows].to(victim.device)
            task = Task(samples.ids[rows], x, y, clean, settings.seed, settings.batch_size, aims)
            with nothing_else_changed(self, victim):
                part = require_candidates(self.spec, self.search(victim, task), len(rows))
            check_tensor(self.spec, part.adversarial, task.x, task.ids)
            full.forwards[rows] += victim.draws * victim.verdicts
            full.take(part, rows)
        return full

    def _verify(
        self, victim: Victim, samples: Samples, found: Candidates, alive: Tensor, seed: int
    ) -> tuple[Tensor, Diagnostics]:
        """Examples inside box and ball, rounding removed; `AttackViolation` for anything beyond rounding."""
        ids, x = samples.ids, samples.x
        adversarial = inside_box(self.spec, ids, found.adversarial)
        if self.spec.space == "image":
            return inside_ball(self.spec, ids, x, adversarial), Diagnostics()
        if self.spec.bounded and found.witness:
            return adversarial, self.check_witness(victim, samples, adversarial, found.witness, alive, seed)
        if self.spec.bounded and not torch.equal(adversarial, x):
            raise AttackViolation(f"attack {self.spec.label!r} returned no witness for its perturbation")
        return adversarial, Diagnostics()

    def check_witness(
        self,
        victim: Victim,
        samples: Samples,
        adversarial: Tensor,
        witness: dict[str, Tensor],
        alive: Tensor,
        seed: int,
    ) -> Diagnostics:
        """Require every witness inside its set, and `adversarial` equal to the image rendered from it again.

        Returns how many images of a flow, encoded, are far from the latents they were decoded from.

        samples: [N]; adversarial: images [N,C,H,W]; alive: [N] bool, the samples to check; seed: of the attack.
        """
        space = self.space()
        if space is None:
            raise AttackViolation(f"attack {self.spec.label!r} returned a witness and declares no set")
        for name, constraint in space.constraints:
            require_constraint(self.spec, samples.ids[alive], witness[name][alive], constraint)
        misplaced = 0
        for rows in regroup(alive.nonzero().squeeze(1), victim.batch_size):
            device, ids = victim.device, samples.ids[rows]
            own = {name: value[rows].to(device) for name, value in witness.items()}
            noise = SampleNoise(seed, self.spec.name, ids, 0, device)
            again = space.image_of(samples.x[rows].to(device), samples.y[rows].to(device), own, noise)
            gap = (again.image.cpu() - adversarial[rows]).abs().flatten(1)
            require(self.spec, ids, gap, 0.0, space.tolerance, "image rendered from its witness")
            misplaced += int(again.misplaced.sum())
        return Diagnostics(decoded=int(alive.sum()) if self.spec.needs_flow else 0, misplaced=misplaced)

    def _outcome(
        self, samples: Samples, clean: Tensor, logits: Tensor, adversarial: Tensor, found: Candidates
    ) -> Outcome:
        y = samples.y
        clean_right = margins(clean, y) > 0  # a tie is wrong
        difference = adversarial - samples.x
        robust = clean_right & ((margins(logits, y) > 0) | self._is_beyond_budget(difference))
        broken_by = [
            None if stays else ("clean" if not right else name)
            for stays, right, name in zip(robust.tolist(), clean_right.tolist(), found.component, strict=True)
        ]
        step = steps_of(self.spec, found, clean_right & ~robust).masked_fill(robust, -1)
        step = torch.where(clean_right | robust, step, torch.zeros_like(step))
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
            l0=norm_of(difference, "l0"),
            cross_entropy=losses(logits, y),
            forwards=found.forwards,
            backwards=found.backwards,
            counts_exact=found.counts_exact,
            adversarial=adversarial,
            witness=found.witness,
        )

    def _is_beyond_budget(self, difference: Tensor) -> Tensor:
        """Perturbations [N,C,H,W] of an unbounded search that are larger than the budget at which its accuracy is
        counted, [N] bool."""
        if self.spec.bounded or self.spec.epsilon is None:
            return torch.zeros(len(difference), dtype=torch.bool)
        return norm_of(difference, self.spec.norm).double() > self.spec.radius


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
