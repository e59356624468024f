"""Counter-based random numbers keyed by (seed, stream, restart, sample id).

The noise of a sample never depends on batch size, order, device or other samples: each sample has its own Philox
counter. Numbers are drawn on the CPU in float64 and cast, so that a GPU gets the same ones.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; stable across processes and versions of Python."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class SampleRandom:
    """Draws random tensors row by row, each row from its own generator.

    seed: of the run. stream: name of the use of the numbers (the attack's name); two streams are independent.
    """

    def __init__(self, seed: int, stream: str) -> None:
        self._seed = seed
        self._stream = stream

    def generator(self, sample_id: int, restart: int = 0) -> np.random.Generator:
        """The generator of one sample."""
        key = derive_seed(self._seed, self._stream, restart, int(sample_id))
        return np.random.Generator(np.random.Philox(key=key))

    def draw(
        self,
        sample_ids: Sequence[int] | Tensor,
        shape: Sequence[int],
        sampler: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray],
        restart: int = 0,
    ) -> Tensor:
        """Float32 tensor (len(sample_ids), *shape): `sampler(generator, shape)` per sample."""
        size = tuple(shape)
        rows = [sampler(self.generator(int(i), restart), size) for i in sample_ids]
        if not rows:
            return torch.zeros((0, *size))
        return torch.from_numpy(np.stack(rows)).to(torch.float32)

    def uniform(self, sample_ids: Sequence[int] | Tensor, shape: Sequence[int], restart: int = 0) -> Tensor:
        """Uniform on [-1, 1), float32, one row per sample."""
        return self.draw(sample_ids, shape, lambda g, s: g.uniform(-1.0, 1.0, s), restart)

    def normal(self, sample_ids: Sequence[int] | Tensor, shape: Sequence[int], restart: int = 0) -> Tensor:
        """Standard normal, float32, one row per sample."""
        return self.draw(sample_ids, shape, lambda g, s: g.standard_normal(s), restart)


class KeyedNumbers:
    """Random numbers for many samples at once, keyed by (seed, stream, restart, sample id) and a counter.

    A number is a hash (splitmix64, Steele et al. 2014) of its sample's key and its counter: no state, nothing shared
    between samples, the same on every device. For searches that draw at every step; `SampleRandom` is the choice for
    a few large draws.
    """

    def __init__(
        self,
        seed: int,
        stream: str,
        sample_ids: Sequence[int] | Tensor,
        restart: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        keys = [derive_seed(seed, stream, restart, int(i)) for i in sample_ids]
        self.keys = torch.tensor(keys, dtype=torch.int64, device=device)

    @staticmethod
    def uniform(keys: Tensor, counter: Tensor, count: int) -> Tensor:
        """[n,count] float32 in [0,1). keys: [n] of this class; counter: [n] int64, number of the draw; at most 2**20
        numbers per draw."""
        bits = KeyedNumbers.bits(keys, counter, count)
        return (bits >> 40 & 0xFFFFFF).to(torch.float32) * 2.0**-24

    @staticmethod
    def bits(keys: Tensor, counter: Tensor, count: int) -> Tensor:
        """[n,count] int64, all 64 bits random; see `uniform`."""
        if not 0 <= count <= 2**20:
            raise ValueError(f"{count} numbers a draw; at most {2**20}")
        places = (counter[:, None] << 20) + torch.arange(count, device=keys.device)
        return _splitmix64(_splitmix64(keys[:, None] + places * _GOLDEN_GAMMA))


_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as int64; products wrap modulo 2**64


def _splitmix64(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, with logical shifts."""
    z = (z ^ (z >> 30 & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ (z >> 27 & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return z ^ (z >> 31 & (2**33 - 1))
