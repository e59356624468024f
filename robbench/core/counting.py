"""Counts in sentences: "1 cell", "2 cells"."""


def count_noun(count: int, noun: str, plural: str = "") -> str:
    """ "1 cell", "2,000 cells"; plural: of a noun whose plural is not formed with "s"."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
