"""The largest meaningful budget: the diameter of the box [0,1]^D, beyond which every image is allowed.

A larger budget is an error of scale, such as 8 of 255 grey levels. No torch here.
"""

import math

from robbench.core.errors import UserError

# (C, H, W) of the images of the built-in data sets.
IMAGE_SHAPES = {
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "digits": (1, 8, 8),
    "fashionmnist": (1, 28, 28),
    "imagenet": (3, 224, 224),
    "mnist": (1, 28, 28),
    "stl10": (3, 96, 96),
    "svhn": (3, 32, 32),
}
ROUNDING = 1e-6  # relative, so that sqrt(3072) with seven digits is accepted


def box_diameter(norm: str, shape: tuple[int, ...] | None) -> float | None:
    """Largest distance of two images of `shape` (C,H,W) with pixels in [0,1]: linf 1, l2 sqrt(D), l1 and l0 D.

    None for a norm without a ball, and for l2, l1 and l0 where the shape is not known.
    """
    if norm == "linf":
        return 1.0
    if shape is None or norm not in ("l2", "l1", "l0"):
        return None
    dimensions = math.prod(shape)
    return math.sqrt(dimensions) if norm == "l2" else float(dimensions)


def require_inside_box(
    budget: float,
    norm: str,
    shape: tuple[int, ...] | None,
    pixel_range: int,
    attack: str,
    option: str = "",
) -> None:
    """`UserError` for an image budget beyond the diameter of the box of images of `shape` (C,H,W; None if unknown).

    budget, pixel_range: on pixels in [0, pixel_range]. attack: its name; option: how the budget was
    given, as "--epsilon 8"; "" for one that nobody gave.
    """
    diameter = box_diameter(norm, shape)
    if diameter is None or budget <= diameter * pixel_range * (1 + ROUNDING):
        return
    given, most = exact_text(budget), f"{diameter * pixel_range:.6g}"
    of = f" of {' x '.join(map(str, shape))} images" if shape is not None and norm != "linf" else ""
    advice = f"give at most {most}"
    if pixel_range == 1 and budget <= 255 * diameter:
        advice = f"give {given}/255 if you mean {given} of 255 grey levels, else at most {most}"
    raise UserError(
        f"{option or f'epsilon {given}'}: attack {attack!r} counts epsilon on pixels 0..{pixel_range}, and this is "
        f"beyond the {norm} diameter of the whole box{of}, {most}; {advice}"
    )


def exact_text(budget: float) -> str:
    """The shortest text from which `--epsilon` reads the same number: "0.1", "8/255", "0.123456789"."""
    if float(short := f"{budget:g}") == budget:
        return short
    levels = round(budget * 255)
    return f"{levels}/255" if levels / 255 == budget else repr(budget)
