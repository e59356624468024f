"""submissions/: two bundles, one of them tampered with, through the script that the review runs; and its workflow."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from written_runs import edited

from robbench.cli.app import main

ROOT = Path(__file__).parents[2]


def robbench(*arguments: object) -> None:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output


def claim_robust(files: dict[str, bytes]) -> None:
    """One sample that was broken is said to have held; every hash is made anew."""
    name = next(name for name in files if name.endswith(".parquet") and "cells/" in name)
    table = pq.read_table(io.BytesIO(files[name])).to_pylist()
    row = next(row for row in table if not row["robust"] and row["clean_prediction"] == row["label"])
    row.update(robust=True, prediction=row["label"], margin=-row["margin"], broken_by=None, broken_at=-1)
    schema = pq.read_schema(io.BytesIO(files[name]))
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table, schema=schema), stream)
    files[name] = stream.getvalue()


@pytest.fixture(scope="module")
def submissions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `honest` and `tampered`, each with a bundle of one cell, and `empty`."""
    root = tmp_path_factory.mktemp("submissions")
    for name in ("honest", "tampered", "empty"):
        (root / name).mkdir()
    run, bundle = root.parent / "run", root / "honest" / "bundle.zip"
    robbench("run", "--model", "digits-standard", "--attacks", "fgsm", "--n", 8, "--keep-examples", "all",
             "--device", "cpu", "--out", run)  # fmt: skip
    robbench("export", run, "-o", bundle)
    edited(bundle, root / "tampered" / "bundle.zip", claim_robust, rehash=True)
    return root


def check(*folders: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ROBBENCH": f"{sys.executable} -m robbench", "SHARE": "1"}
    command = [str(ROOT / "submissions" / "check"), *map(str, folders)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_tampered_bundle_is_refused_and_an_honest_one_accepted(submissions: Path) -> None:
    done = check(
        submissions / "honest", submissions / "tampered", submissions / "empty", submissions / "Bad name"
    )
    verdicts = re.findall(r"^(accepted|refused) ([\w ]+)", done.stdout, re.MULTILINE)
    assert verdicts == [
        ("accepted", "honest"), ("refused", "tampered"), ("refused", "empty"), ("refused", "Bad name")
    ], done.stdout + done.stderr  # fmt: skip
    assert done.returncode == 1


def test_nothing_to_check_is_said(submissions: Path) -> None:
    assert check().returncode == 2


def workflow() -> dict[Any, Any]:
    content = yaml.safe_load((ROOT / ".github" / "workflows" / "submission.yml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_the_workflow_judges_with_the_main_branch_and_has_no_rights() -> None:
    content = workflow()
    assert content["permissions"] == {"contents": "read"}
    assert set(content[True]) == {"pull_request"}  # YAML 1.1 reads the key "on" as true
    steps = content["jobs"]["verify"]["steps"]
    commands = " ".join(str(step.get("run", "")) for step in steps)
    assert "base/submissions/check" in commands
    assert "pull/submissions/check" not in commands
    assert "pip install ./base" in commands
    assert all(
        not step["with"]["persist-credentials"] for step in steps if "checkout" in step.get("uses", "")
    )
    assert "secrets." not in yaml.safe_dump(content)
