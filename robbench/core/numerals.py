"""Parsing numbers in options and files, at a bounded cost.

Python's `int` fails at 4,300 digits with a traceback, and `Fraction("1e999999999")` takes all memory.
"""

import math
import re

_WHOLE = re.compile(r"[0-9]{1,18}")  # fits into 64 bits
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,4})?")
_FRACTION = re.compile(r"([+-]?[0-9]{1,15})/([0-9]{1,15})")  # both sides are exact in float64


def whole_number(text: str) -> int | None:
    """A whole number from 0 below 10^18; None for any other text."""
    return int(text) if _WHOLE.fullmatch(text.strip()) else None


def number(text: str) -> float | None:
    """A finite decimal number (0.1, 3e-2) or a fraction of whole numbers (8/255); None for any other text."""
    text = text.strip()
    if fraction := _FRACTION.fullmatch(text):
        above, below = (int(part) for part in fraction.groups())
        return above / below if below else None
    if not _DECIMAL.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None
