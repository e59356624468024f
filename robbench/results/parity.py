"""The committed parity table of an AutoAttack row: `reports/autoattack/parity.yaml`."""

from functools import cache

from robbench.core.precision import withdrawal
from robbench.core.resources import data_root
from robbench.core.schema import Strict, load_yaml
from robbench.store.records import CellRecord

ALGORITHM = "autoattack"


class ParityTables(Strict):
    """version: of the tables of reports/autoattack. engines: as cells record them, that the tables were measured
    with."""

    version: int
    engines: tuple[str, ...]


def parity_note(cell: CellRecord) -> str:
    """ "robbench aa, parity table v2" for a cell of robbench's own AutoAttack, and "" for any other.

    The note states where the shipped tables were measured with another engine; searches in a withdrawn precision have
    no table.
    """
    if cell.attack.algorithm != ALGORITHM:
        return ""
    tables = _load_tables()
    if withdrawal(cell.search_precision):
        return "robbench aa: no parity table"
    if cell.engine in tables.engines:
        return f"robbench aa, parity table v{tables.version}"
    return (
        f"robbench aa, {cell.engine}: no parity table (v{tables.version} is of {', '.join(tables.engines)})"
    )


@cache
def _load_tables() -> ParityTables:
    return load_yaml(data_root() / "reports" / "autoattack" / "parity.yaml", ParityTables)
