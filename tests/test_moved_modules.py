"""Old names of modules lead to the modules that they named, with a warning."""

import importlib
import subprocess
import sys

import pytest

from robbench.core.moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_the_module(old: str, new: str) -> None:
    pytest.importorskip("ray") if new.endswith("ray_backend") else None
    module = importlib.import_module(new)
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is {new} now"):
        found = importlib.import_module(old)
    assert {name for name in vars(module) if not name.startswith("__")} <= set(vars(found))
    assert module.__name__ == new
    assert module.__spec__ is not None
    assert module.__spec__.name == new


def test_from_imports_work_in_a_fresh_process() -> None:
    code = (
        "from robbench.errors import UserError as old; from robbench.core.errors import UserError; "
        "assert old is UserError"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_console_scripts_of_before_still_start() -> None:
    from robbench.cli import main
    from robbench.cli.app import main as now

    assert main is now
