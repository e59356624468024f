"""The precision in which attacks search classifiers: fp32, which verdicts are in too. Lower ones were withdrawn."""

from typing import Literal, TypeGuard, get_args

from robbench.core.errors import UserError, unknown_name

SearchPrecision = Literal["fp32"]
PRECISIONS: tuple[SearchPrecision, ...] = get_args(SearchPrecision)
# Precisions of earlier versions, and why they are gone. Ledgers and bundles may still name them.
WITHDRAWN = {
    "bf16": "on a model with masked gradients it left 165 of 200 images robust where fp32 leaves 162",
    "tf32": "APGD in simulated TF32 left 115 of 200 images robust where the reference package leaves 112 to 114",
}


def checked_precision(name: str) -> SearchPrecision:
    """`name` as the precision of a search. `UserError` for one that was withdrawn or never existed."""
    if name in WITHDRAWN:
        raise UserError(
            f"--precision {name} was withdrawn because it overstates robustness ({WITHDRAWN[name]}); "
            f"search in fp32, the default"
        )
    if not _is_known(name):
        raise unknown_name("precision", name, PRECISIONS)
    return name


def recorded(precision: SearchPrecision, compiled: bool) -> str:
    """How a cell records what its search computed in: "fp32", "fp32, compiled"."""
    return precision + (", compiled" if compiled else "")


def read_record(search_precision: str) -> tuple[str, bool]:
    """(precision, compiled) of what a cell records; the precision may be one that is not known here."""
    name, _, compiled = search_precision.partition(", ")
    return name, bool(compiled)


def withdrawal(search_precision: str) -> str:
    """What a reader must know of a cell that was searched in a withdrawn precision; "" for any other cell.
    search_precision: as the cell records it."""
    name, _ = read_record(search_precision)
    return (
        f"searched in {name}, which was withdrawn because it overstates robustness"
        if name in WITHDRAWN
        else ""
    )


def _is_known(name: str) -> TypeGuard[SearchPrecision]:
    return name in PRECISIONS
