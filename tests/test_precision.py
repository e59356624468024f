"""What attacks may search in, and that a precision which was withdrawn is refused everywhere, with the reason."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.core.precision import (
    PRECISION,
    WITHDRAWN,
    check_precision,
    format_record,
    read_record,
    withdrawal,
)

MATRIX = ["--model", "digits-at", "--n", "4"]
COMMANDS = {
    "run": ["run", *MATRIX, "--attacks", "pgd20"],
    "dry run": ["run", *MATRIX, "--attacks", "pgd20", "--dry-run"],
    "experiment": ["run", "--experiment", "ijsat-table1"],
    "bench": ["bench", "aa", *MATRIX],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", WITHDRAWN)
def test_a_withdrawn_precision_is_refused_before_anything_is_computed(
    command: str, name: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(main, [*COMMANDS[command], "--precision", name, "--out", str(out)])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert all(word in line for word in (f"--precision {name}", "overstates", "fp32"))
    assert not out.exists()


@pytest.mark.parametrize("name", ["bf16", "tf32", "fp8", "", "FP32"])
def test_from_python(name: str) -> None:
    with pytest.raises(UserError, match="precision"):
        check_precision(name)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", [PRECISION, *WITHDRAWN])
def test_what_a_cell_records_is_read_back(name: str, compiled: bool) -> None:
    text = format_record(compiled).replace(PRECISION, name)
    assert read_record(text) == (name, compiled)
    assert bool(withdrawal(text)) == (name in WITHDRAWN)


def test_every_precision_that_is_offered_can_be_used() -> None:
    check_precision(PRECISION)
    assert PRECISION not in WITHDRAWN
