"""Choice of the adversarial examples in a bundle: a share or a number of those that a cell stores, drawn by seed."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from robbench.core.errors import UserError
from robbench.core.numerals import number


@dataclass(frozen=True)
class ExampleChoice:
    """requested: the user's text. share: of the examples that a cell stores, rounded up; count: largest number; one of
    both is None. seed: of the order in which samples are chosen, the same in every cell, so that one clean image serves
    all cells."""

    requested: str
    share: Fraction | None
    count: int | None
    seed: int

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "ExampleChoice":
        """`--examples`: "all", "none", a share as in 0.1, 1/8 or 10%, or a whole number per cell; else `UserError`."""
        requested = text.strip()
        if requested in ("all", "none"):
            return cls(requested, Fraction(requested == "all"), None, seed)
        if requested.isascii() and requested.isdecimal() and len(requested) < 19:
            return cls(requested, None, int(requested), seed)
        percent, digits = requested.endswith("%"), requested.removesuffix("%").strip()
        # Checked first: `Fraction` is exact, and a large exponent would take all memory.
        share = Fraction(-1) if number(digits) is None else Fraction(digits) / (100 if percent else 1)
        if not 0 <= share <= 1:
            raise UserError(
                f"--examples {text[:40]!r} is no choice; give a share from 0.0 to 1.0, a whole number a cell, all "
                f"or none"
            )
        return cls(requested, share, None, seed)

    def choose(self, stored: Sequence[int]) -> frozenset[int]:
        """The samples whose examples go into the bundle, of the ids with a stored example."""
        count = self.count if self.share is None else math.ceil(self.share * len(stored))
        return frozenset(sorted(stored, key=self._place)[:count])

    def _place(self, sample: int) -> bytes:
        return hashlib.sha256(f"{self.seed} {sample}".encode()).digest()
