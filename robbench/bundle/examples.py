"""Which adversarial examples go into a bundle: a share or a number of those a cell stores, drawn by seed."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from robbench.core.errors import UserError
from robbench.core.numerals import number


@dataclass(frozen=True)
class ExampleChoice:
    """asked: the text the user gave. share: of the examples a cell stores, rounded up; count: at most so many. One of
    both is None. seed: of the order in which samples are taken, the same in every cell, so that one original serves
    all of them."""

    asked: str
    share: Fraction | None
    count: int | None
    seed: int

    @classmethod
    def parsed(cls, text: str, seed: int = 0) -> "ExampleChoice":
        """`--examples`: "all", "none", a share as in 0.1, 1/8 or 10%, or a whole number a cell. `UserError` else."""
        asked = text.strip()
        if asked in ("all", "none"):
            return cls(asked, Fraction(asked == "all"), None, seed)
        if asked.isascii() and asked.isdecimal() and len(asked) < 19:
            return cls(asked, None, int(asked), seed)
        percent, digits = asked.endswith("%"), asked.removesuffix("%").strip()
        # Checked first: `Fraction` is exact, and takes any memory that an exponent asks for.
        share = Fraction(-1) if number(digits) is None else Fraction(digits) / (100 if percent else 1)
        if not 0 <= share <= 1:
            raise UserError(
                f"--examples {text[:40]!r} is no choice; give a share from 0.0 to 1.0, a whole number a cell, all "
                f"or none"
            )
        return cls(asked, share, None, seed)

    def chosen(self, stored: Sequence[int]) -> frozenset[int]:
        """Those of the sample ids with a stored example that go into the bundle."""
        count = self.count if self.share is None else math.ceil(self.share * len(stored))
        return frozenset(sorted(stored, key=self._place)[:count])

    def _place(self, sample: int) -> bytes:
        return hashlib.sha256(f"{self.seed} {sample}".encode()).digest()
