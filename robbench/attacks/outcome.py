"""What an attack on a classifier gives."""

from dataclasses import dataclass, field

from torch import Tensor

from robbench.attacks.trust.suspicions import Diagnostics, Suspicion


@dataclass
class Outcome:
    """Verified result of an attack: all tensors on the CPU, N rows in the order of the call.

    Attributes:
        sample_ids, labels: [N] int64.
        clean_predictions, clean_margins: class of the clean image, and logit of the label minus the largest other one.
        predictions, margins: the same of the attacked image.
        robust: [N] bool, right on the clean image and under attack. Of a minimal-norm attack with a budget: no
            misclassified image within it was found.
        broken_by: per sample "clean", the component that broke it, or None where it is robust.
        broken_at: gradient steps or queries until the sample was broken, 0 for "clean", -1 where it is robust.
        l1, l2, linf: norms of the perturbation, in [0,1] pixels.
        l0: number of values (a channel of a pixel each) that differ.
        cross_entropy: of the attacked image, in nats.
        forwards, backwards: calls of the model per sample; means over a batch where `counts_exact` is False.
        adversarial: images [N,C,H,W] in [0,1].
        witness: perturbations that an example is rendered from, by name (latent: "lambda" [N,D]); empty for balls of
            pixels.
        targets: class that a targeted attack had to reach, [N] int64; None for untargeted ones. reached: [N] bool, the
            attacked image is classified as the target; a target that is the label cannot be reached.
        diagnostics: counts that show whether the model may be hard to attack for the wrong reasons.
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
    l0: Tensor
    cross_entropy: Tensor
    forwards: Tensor
    backwards: Tensor
    counts_exact: bool
    adversarial: Tensor
    witness: dict[str, Tensor]
    targets: Tensor | None = None
    reached: Tensor | None = None
    diagnostics: Diagnostics = field(default_factory=Diagnostics)

    @property
    def under_attack(self) -> Tensor:
        """Whether each attacked image is classified correctly, [N] bool, as accuracy under attack counts them."""
        return self.margins > 0  # a tie is wrong

    @property
    def suspicions(self) -> tuple[Suspicion, ...]:
        """Reasons why the verdicts may overstate robustness, from `diagnostics`."""
        return self.diagnostics.suspicions
