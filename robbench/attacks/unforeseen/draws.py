"""Random numbers of scenes and starts, from the noise of a search."""

from torch import Tensor

from robbench.attacks.search.geometry import Noise


def fractions(noise: Noise, shape: tuple[int, ...]) -> Tensor:
    """Uniform on [0, 1], [n, *shape]."""
    return noise.uniform(shape) * 0.5 + 0.5


def integers(noise: Noise, shape: tuple[int, ...], count: int) -> Tensor:
    """Uniform on 0, ..., count - 1, [n, *shape] float32."""
    return (fractions(noise, shape) * count).floor().clamp(max=count - 1)  # 1 by rounding of float32
