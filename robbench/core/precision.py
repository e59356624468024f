"""The precision in which attacks search classifiers: fp32, as for verdicts. Lower ones were withdrawn."""

from robbench.core.errors import UserError, unknown_name

PRECISION = "fp32"
# Precisions of earlier versions, and why they are gone. Ledgers and bundles may still name them.
WITHDRAWN = {
    "bf16": "on a model with masked gradients it left 165 of 200 images robust where fp32 leaves 162",
    "tf32": "APGD in simulated TF32 left 115 of 200 images robust where the reference package leaves 112 to 114",
}


def check_precision(name: str) -> None:
    """`UserError` for a withdrawn or unknown precision."""
    if name in WITHDRAWN:
        raise UserError(
            f"--precision {name} was withdrawn because it overstates robustness ({WITHDRAWN[name]}); "
            f"search in fp32, the default"
        )
    if name != PRECISION:
        raise unknown_name("precision", name, (PRECISION,))


def format_record(compiled: bool) -> str:
    """A cell's record of its search precision: "fp32", or "fp32, compiled" with torch.compile."""
    return f"{PRECISION}, compiled" if compiled else PRECISION


def read_record(search_precision: str) -> tuple[str, bool]:
    """(precision, compiled) from a cell's record; the precision may be unknown here."""
    name, _, compiled = search_precision.partition(", ")
    return name, bool(compiled)


def withdrawal(search_precision: str) -> str:
    """A remark on a cell that was searched in a withdrawn precision; "" for any other. search_precision: as
    recorded."""
    name, _ = read_record(search_precision)
    return (
        f"searched in {name}, which was withdrawn because it overstates robustness"
        if name in WITHDRAWN
        else ""
    )
