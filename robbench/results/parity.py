"""Which committed parity table stands behind an AutoAttack row: `reports/autoattack/parity.yaml`."""

from functools import cache

from robbench.core.precision import withdrawal
from robbench.core.resources import data_root
from robbench.core.schema import Strict, load_yaml
from robbench.store.records import CellRecord

ALGORITHM = "autoattack"


class ParityTables(Strict):
    """version: of the tables of reports/autoattack. engines: as cells record them, which the tables hold for."""

    version: int
    engines: tuple[str, ...]


def parity_note(cell: CellRecord) -> str:
    """ "robbench aa, parity table v2" for a cell of robbench's own AutoAttack, and "" for any other.

    An engine that the shipped tables were not measured with is named as such; searches in a precision that was
    withdrawn have none.
    """
    if cell.attack.algorithm != ALGORITHM:
        return ""
    tables = _shipped()
    if withdrawal(cell.search_precision):
        return "robbench aa: no parity table"
    if cell.engine in tables.engines:
        return f"robbench aa, parity table v{tables.version}"
    return (
        f"robbench aa, {cell.engine}: no parity table (v{tables.version} is of {', '.join(tables.engines)})"
    )


@cache
def _shipped() -> ParityTables:
    return load_yaml(data_root() / "reports" / "autoattack" / "parity.yaml", ParityTables)
