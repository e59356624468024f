"""`--device` as a torch device, its clock, and the versions on which results depend."""

import platform
import time

import torch

from robbench.core.errors import UserError, spell_argument
from robbench.core.versions import installed_version

VERSIONED = ("torch", "torchvision", "numpy", "pyautoattack", "scikit-learn")


def resolve_device(name: str) -> torch.device:
    """auto (CUDA when there is one) | cpu | cuda | cuda:N; `UserError` for anything else or absent CUDA."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()) or name.endswith(":"):
        raise UserError(
            f"{spell_argument('device', repr(name))} is not a device; give auto, cpu, cuda or cuda:N"
        )
    if not torch.cuda.is_available():
        built = "has no CUDA support" if torch.version.cuda is None else "finds no usable NVIDIA GPU"
        raise UserError(
            f"{spell_argument('device', repr(name))}: PyTorch {torch.__version__} {built}; "
            f"give {spell_argument('device', 'cpu')}, or see robbench doctor"
        )
    if index and int(index) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"{spell_argument('device', repr(name))}: there are {count} CUDA devices; give cuda:0 to cuda:{count - 1}"
        )
    return torch.device(name)


def device_text(device: torch.device) -> str:
    """ "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """Versions of Python, robbench and the packages on which results depend."""
    from robbench import __version__

    found = {"python": platform.python_version(), "robbench": __version__}
    for package in VERSIONED:
        found[package] = installed_version(package) or "not installed"
    return found


def now(device: torch.device) -> float:
    """Seconds of a clock: wall time, or with one CPU thread the CPU time of this process, independent of other load."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (
        time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()
    )
