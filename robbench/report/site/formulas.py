"""Formulas of threat models, attacks and measures as MathML, and what their letters mean."""

# ruff: noqa: RUF001 - the letters of formulas are meant
from markupsafe import Markup

from robbench.core.errors import UserError
from robbench.core.foreign import foreign_code
from robbench.core.mathml import length, math, row, sub, sup, under
from robbench.specs import Measure, ModelKind, Norm, ResolvedAttack, Space

_INDEX = {"linf": "∞", "l2": "2", "l1": "1", "l0": "0"}


def admissible(space: Space, norm: Norm, pixel_range: int) -> tuple[Markup, str]:
    """The set of images that an attacker may choose from, and what its letters mean."""
    latent = _ball("λ", "η", norm)
    if space == "image":
        box = sup(f"[0, {pixel_range}]", "d")
        return math("𝒜(x) = {x′ ∈", box, ":", _ball("x′ - x", "ε", norm), "}"), (
            f"x: the clean image of d pixels in [0, {pixel_range}]; ε: the budget, in the same units."
        )
    if space == "latent":
        return math("𝒜(x) = {clip(G(F(x) + λ)) :", latent, "}"), (
            "F: the normalizing flow from images to latents, G its inverse; λ: a move of all latents as one vector, η "
            "its budget in raw latents; clip: to pixels in [0, 1]. How far the image moves is not bounded."
        )
    if space == "joint":
        return math("𝒜(x) = {clip(G(F(x) + λ) + δ) :", latent, ",", _ball("δ", "ε", norm), "}"), (
            "F: the normalizing flow from images to latents, G its inverse; λ: a move of the latents with budget η; δ: "
            "a move of the decoded image with budget ε; clip: to pixels in [0, 1]. The whole move of the image is not "
            "bounded by ε."
        )
    if space == "rendered":
        return math("𝒜(x) = {clip(R(x, v)) : v ∈", sub("𝒱", "ε"), "}"), (
            "R: the renderer of the attack, from the clean image and its variables v to an image; 𝒱: the variables "
            "that the attack allows, ε: its budget, in the unit of the renderer; clip: to pixels in [0, 1]. How far "
            "the image moves is not bounded by ε."
        )
    if space == "minimal":
        ball = _ball("x′ - x", "ε", norm)
        return math("𝒜(x) = {x′ ∈", sup(f"[0, {pixel_range}]", "d"), "}, counted where", ball), (
            "x: the clean image of d pixels; the search takes the nearest misclassified image anywhere in the box, and "
            "the accuracy counts a sample as lost where it is within ε."
        )
    return math("𝒜(x) = {c(x)}"), (
        "c: the corruption, read from files or generated from the seed. There is nothing to search."
    )


def _ball(what: str, radius: str, norm: Norm) -> Markup:
    if norm == "none":
        return row(f"{what} ∼ 𝒩(0,", sup(radius, "2"), "I)")
    return row(length(what, _INDEX[norm]), f"≤ {radius}")


def measure(
    target: ModelKind, shown: Measure = "robust accuracy", several: bool = False
) -> tuple[Markup, str]:
    """The number in the tables. shown: which accuracy, of a classifier; several: over all attacks a of a model."""
    mean = row("1 / n", under("∑", "i"))
    if target == "flow":
        return math(mean, "(-", sub("log", "2"), "p(", sub("x′", "i"), ") / d)"), (
            "Mean negative log-likelihood in bits per dimension of the attacked images under the flow's density p."
        )
    right = _right(sub("x′", "i, a" if several else "i"))
    if shown == "accuracy under attack":
        return math(mean, right), (
            "Accuracy under attack: the share of all n test images, each of them perturbed, that the model f gets "
            "right on the perturbed image, whatever it says of the clean one."
        )
    worst = row(under("min", "a"), right) if several else right
    return math(mean, _right(sub("x", "i")), worst), (
        "Robust accuracy: the share of all n test images that the model f gets right without attack and under it"
        + (", whatever attack a it is; perturbations are no part of it." if several else ".")
    )


def _right(image: Markup) -> Markup:
    """1 where the model classifies `image` correctly, else 0."""
    return row("𝟏[", under("arg max", "k"), sub("f", "k"), "(", image, ") =", sub("y", "i"), "]")


def objective(attack: ResolvedAttack) -> tuple[tuple[Markup, ...], str]:
    """What an attack looks for and how, as its class declares it, and the same in words."""
    import robbench.attacks  # loads torch, which only the pages of attacks need

    try:
        with foreign_code(f"the objective of attack {attack.label!r}"):
            goal, how = robbench.attacks.ATTACKS.get(attack.algorithm).objective(attack)
            return tuple(goal), str(how)
    except UserError:  # a package that is not installed here, does not import, or fails
        return (), f"The algorithm {attack.algorithm!r} belongs to another package."
