"""`robbench doctor`: what is there, what is missing and how to get it. Downloads nothing."""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from robbench.cli.base import echo_line, print_json
from robbench.core.errors import UserError
from robbench.core.resources import data_root, dataset_root
from robbench.core.stops import reraise_stop
from robbench.data.names import BUILT_IN, dataset_names, place
from robbench.models.entry import ZooEntry
from robbench.models.zoo import present_weights, zoo_entries
from robbench.recipes import recipes
from robbench.specs import threat_models

State = Literal["ok", "missing", "broken"]
REQUIRED = (
    ("torch", "torch"),
    ("torchvision", "torchvision"),
    ("numpy", "numpy"),
    ("pandas", "pandas"),
    ("pyarrow", "pyarrow"),
    ("scikit-learn", "sklearn"),
    ("safetensors", "safetensors"),
    ("pyautoattack", "pyautoattack"),
    ("pydantic", "pydantic"),
    ("rich", "rich"),
    ("jinja2", "jinja2"),
    ("pillow", "PIL"),
)


@dataclass(frozen=True)
class Finding:
    """One line. "missing" is optional and comes with how to get it, "broken" is an error."""

    state: State
    what: str
    details: str


def examine(
    zoo: Path | None, data_dir: Path | None, checkpoints: Path | None = None, as_json: bool = False
) -> bool:
    """Print every finding; False when something required is broken."""
    found: list[dict[str, str]] = []
    for title, findings in (
        ("Machine", _machine()),
        ("Packages", _packages()),
        ("Device", _device()),
        ("Specs", _specs()),
        ("Data sets", _data_sets(data_dir)),
        ("Models", _models(zoo, checkpoints)),
        ("Optional tools", _optional()),
    ):
        if not as_json:
            echo_line(title)
        for finding in findings:
            found.append({"section": title, **asdict(finding)})
            if not as_json:
                echo_line(f"  {finding.state:8} {finding.what:24} {finding.details}")
    healthy = all(entry["state"] != "broken" for entry in found)
    if as_json:
        print_json({"healthy": healthy, "findings": found})
    else:
        echo_line("Everything required works." if healthy else "Something required is broken; see above.")
    return healthy


def _machine() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("ok", "cores", f"{os.cpu_count()}")
    from robbench.core.allocator import tune_allocator

    try:
        allocator = tune_allocator()
        yield Finding("missing" if allocator.state == "unsupported" else "ok", "allocator", allocator.reason)
    except UserError as error:
        yield Finding("broken", "allocator", str(error))


def _packages() -> Iterator[Finding]:
    from robbench.core.device import installed_version

    for package, module in REQUIRED:
        try:
            import_module(module)
        except BaseException as error:  # an import can fail in any way; each one is a finding
            reraise_stop(error)
            reason = " ".join(str(error).split())[:120]
            yield Finding("broken", package, f"does not import ({reason}); pip install --upgrade {package}")
        else:
            yield Finding("ok", package, installed_version(package) or "version unknown")


def _device() -> Iterator[Finding]:
    import torch

    number = torch.get_num_threads()
    said = "--threads and OMP_NUM_THREADS go first"
    yield Finding("ok", "threads", f"{number} for large networks, 1 for small ones ({said})")
    if not torch.cuda.is_available():
        reason = (
            "PyTorch is built without CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU found"
        )
        yield Finding("missing", "cuda", f"{reason}; robbench runs on the CPU")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def _specs() -> Iterator[Finding]:
    for what, read in (("threat models", threat_models), ("recipes", recipes)):
        try:
            yield Finding("ok", what, f"{len(read())} in {data_root()}")
        except UserError as error:
            yield Finding("broken", what, str(error))


def _data_sets(data_dir: Path | None) -> Iterator[Finding]:
    try:
        root = dataset_root(data_dir)
    except UserError as error:
        yield Finding("broken", "data folder", str(error))
        return
    for name in dataset_names():
        if name not in BUILT_IN or not BUILT_IN[name].files:
            yield Finding("ok", name, "inside an installed package")
        elif found := place(name, root):
            yield Finding("ok", name, str(found))
        else:
            how = "downloaded at first use, or name its folder with --data-dir or ROBBENCH_DATA"
            yield Finding("missing", name, f"not in {root}; {how}")


def _models(zoo: Path | None, checkpoints: Path | None) -> Iterator[Finding]:
    try:
        entries = zoo_entries(zoo, checkpoints)
    except UserError as error:
        yield Finding("broken", "zoo", str(error))
        return
    if not entries:
        yield Finding("missing", "zoo", "no models; train one: robbench train --defense standard")
    for name, entry in entries.items():
        yield _model(name, entry)


def _model(name: str, entry: ZooEntry) -> Finding:
    from robbench.models.code import may_run
    from robbench.models.loading import load_model

    weights = entry.card.weights
    try:
        if present_weights(entry) is None and (weights.urls or entry.card.source):
            get = "downloaded at first use" if weights.urls else f"get it from {entry.card.source}"
            how = f"{weights.file} is not on this machine; {get}, or name its folder with --checkpoints"
            return Finding("missing", name, how)
        if not may_run(entry):
            return Finding(
                "missing", name, "not tried: its card names code, which runs only with --model CARD"
            )
        loaded = load_model(entry)
    except UserError as error:
        return Finding("broken", name, str(error))
    parameters = sum(parameter.numel() for parameter in loaded.module.parameters())
    golden = "golden outputs agree" if entry.card.golden is not None else "no golden outputs to compare with"
    what = f"{entry.card.dataset}, {entry.card.defense}, {parameters:,} parameters, {golden}"
    return Finding("ok", name, what)


def _optional() -> Iterator[Finding]:
    from robbench.core.device import installed_version

    for package, extra, use in (
        ("playwright", "dev", "browser test of the HTML report"),
        ("foolbox", "dev", "reference attacks in tests"),
        ("ray", "ray", "--backend ray"),
        ("mlflow-skinny", "mlflow", "robbench report --mlflow"),
        ("FrEIA", "bench", "robbench bench latent and flows"),
    ):
        version = installed_version(package)
        if version is None:
            yield Finding("missing", package, f"{use}; pip install 'robbench[{extra}]'")
        else:
            yield Finding("ok", package, f"{version}, {use}")
