"""`robbench doctor`: what is there, what is missing and how to get it. Downloads nothing."""

import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from robbench.cli.base import echo_line, print_json
from robbench.core.errors import UserError, unknown_name
from robbench.core.resources import data_root, dataset_root
from robbench.core.stops import reraise_stop
from robbench.core.versions import installed_version
from robbench.data.names import BUILT_IN, dataset_names, place

if TYPE_CHECKING:
    from robbench.models.entry import ZooEntry

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


Checks = dict[
    str, Callable[[], Finding]
]  # by what they find out about; nothing is imported before one is called


def examine(
    zoo: Path | None,
    data_dir: Path | None,
    checkpoints: Path | None = None,
    as_json: bool = False,
    what: Sequence[str] = (),
) -> bool:
    """Print every finding, or those about `what`: titles of sections ("models", "data-sets") and things in them
    ("torch"). False when something required is broken; `UserError` for what nothing is known of."""
    sections: dict[str, Callable[[], Checks]] = {
        "Machine": _machine,
        "Packages": _packages,
        "Device": _device,
        "Specs": _specs,
        "Data sets": lambda: _data_sets(data_dir),
        "Models": lambda: _models(zoo, checkpoints),
        "Optional tools": _optional,
    }
    found: list[dict[str, str]] = []
    for title, checks in _choose(sections, what):
        if not as_json:
            echo_line(title)
        for name, check in checks.items():
            finding = check()
            found.append({"section": title, **asdict(finding)})
            if not as_json:
                _echo_finding(finding.state, name, finding.details)
    healthy = all(entry["state"] != "broken" for entry in found)
    if as_json:
        print_json({"healthy": healthy, "findings": found})
    else:
        echo_line("Everything required works." if healthy else "Something required is broken; see above.")
    return healthy


def _echo_finding(state: str, name: str, details: str) -> None:
    """A finding on one line; on a terminal wrapped at its width, below the start of the details."""
    head = f"  {state:8} {name:24} "
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or width < 2 * len(head):
        echo_line(head + details)
        return
    for line in textwrap.wrap(details, width - len(head), break_on_hyphens=False) or [""]:
        echo_line(head + line)
        head = " " * len(head)


def _choose(sections: dict[str, Callable[[], Checks]], what: Sequence[str]) -> Iterator[tuple[str, Checks]]:
    """The sections with the checks about `what`. Sections are looked into one after the other, until all is found: what
    the devices are called, for one, takes an import of torch."""
    titles = {title.lower().replace(" ", "-"): title for title in sections}
    if not what:
        yield from ((title, checks()) for title, checks in sections.items())
        return
    left, seen = [name for name in what if name not in titles], list(titles)
    order = sorted(sections, key=lambda title: (title == "Device", title == "Models"))
    for title in order:
        named = any(titles.get(name) == title for name in what)
        if not (named or left):
            continue
        checks = sections[title]()
        seen += checks
        chosen = {name: check for name, check in checks.items() if named or name in left}
        left = [name for name in left if name not in checks]
        if chosen:
            yield title, chosen
    if left:
        raise unknown_name("thing to look at", left[0], seen)


def _machine() -> Checks:
    def allocator() -> Finding:
        from robbench.core.allocator import tune_allocator

        try:
            found = tune_allocator()
        except UserError as error:
            return Finding("broken", "allocator", str(error))
        return Finding("missing" if found.state == "unsupported" else "ok", "allocator", found.reason)

    return {
        "python": lambda: Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}"),
        "cores": lambda: Finding("ok", "cores", f"{os.cpu_count()}"),
        "allocator": allocator,
    }


def _packages() -> Checks:
    return {package: partial(_package, package, module) for package, module in REQUIRED}


def _package(package: str, module: str) -> Finding:
    try:
        import_module(module)
    except BaseException as error:  # an import can fail in any way; each one is a finding
        reraise_stop(error)
        reason = " ".join(str(error).split())[:120]
        how = f"does not import ({reason}); pip install --upgrade {package}"
        return Finding("broken", package, how)
    return Finding("ok", package, installed_version(package) or "version unknown")


def _device() -> Checks:
    import torch

    number = torch.get_num_threads()
    said = f"{number} for large networks, 1 for small ones (--threads and OMP_NUM_THREADS go first)"
    checks: Checks = {"threads": lambda: Finding("ok", "threads", said)}
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        reason = "no usable NVIDIA GPU found" if built else "PyTorch is built without CUDA"
        return {**checks, "cuda": lambda: Finding("missing", "cuda", f"{reason}; robbench runs on the CPU")}
    return {**checks, **{f"cuda:{n}": partial(_gpu, n) for n in range(torch.cuda.device_count())}}


def _gpu(index: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Finding("ok", f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def _specs() -> Checks:
    from robbench.recipes import recipes
    from robbench.specs import threat_models

    return {
        "threat models": partial(_read, "threat models", threat_models),
        "recipes": partial(_read, "recipes", recipes),
    }


def _read(what: str, read: Callable[[], Sized]) -> Finding:
    try:
        return Finding("ok", what, f"{len(read())} in {data_root()}")
    except UserError as error:
        return Finding("broken", what, str(error))


def _data_sets(data_dir: Path | None) -> Checks:
    try:
        root = dataset_root(data_dir)
    except UserError as error:
        finding = Finding("broken", "data folder", str(error))
        return {"data folder": lambda: finding}
    return {name: partial(_data_set, name, root) for name in dataset_names()}


def _data_set(name: str, root: Path) -> Finding:
    if name not in BUILT_IN or not BUILT_IN[name].files:
        return Finding("ok", name, "inside an installed package")
    if found := place(name, root):
        return Finding("ok", name, str(found))
    how = "downloaded at first use, or name" if BUILT_IN[name].trains else "name"
    return Finding("missing", name, f"not whole in {root}; {how} its folder with --data-dir or ROBBENCH_DATA")


def _models(zoo: Path | None, checkpoints: Path | None) -> Checks:
    from robbench.models.zoo import zoo_entries

    try:
        entries = zoo_entries(zoo, checkpoints)
    except UserError as error:
        broken = Finding("broken", "zoo", str(error))
        return {"zoo": lambda: broken}
    if not entries:
        none = Finding("missing", "zoo", "no models; train one: robbench train --defense standard")
        return {"zoo": lambda: none}
    return {name: partial(_model, name, entry) for name, entry in entries.items()}


def _model(name: str, entry: "ZooEntry") -> Finding:
    from robbench.models.code import may_run
    from robbench.models.loading import load_model
    from robbench.models.zoo import present_weights

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


def _optional() -> Checks:
    return {
        package: partial(_tool, package, extra, use)
        for package, extra, use in (
            ("playwright", "dev", "browser test of the HTML report"),
            ("foolbox", "dev", "reference attacks in tests"),
            ("ray", "ray", "--backend ray"),
            ("mlflow-skinny", "mlflow", "robbench report --mlflow"),
            ("FrEIA", "bench", "robbench bench latent and flows"),
        )
    }


def _tool(package: str, extra: str, use: str) -> Finding:
    version = installed_version(package)
    if version is None:
        return Finding("missing", package, f"{use}; pip install 'robbench[{extra}]'")
    return Finding("ok", package, f"{version}, {use}")
