"""`--device` as a torch device, its clock, and the versions a result depends on."""

import platform
import time

import torch

from robbench.core.errors import UserError
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
        raise UserError(f"--device {name!r} is not a device; give auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        built = "has no CUDA support" if torch.version.cuda is None else "finds no usable NVIDIA GPU"
        raise UserError(
            f"--device {name!r}: PyTorch {torch.__version__} {built}; "
            f"give --device cpu, or see robbench doctor"
        )
    if index and int(index) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {name!r}: there are {count} CUDA devices; give cuda:0 to cuda:{count - 1}")
    return torch.device(name)


def device_text(device: torch.device) -> str:
    """What computes on `device`: "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """Versions of Python, robbench and the packages whose numbers enter a result."""
    from robbench import __version__

    found = {"python": platform.python_version(), "robbench": __version__}
    for package in VERSIONED:
        found[package] = installed_version(package) or "not installed"
    return found


def now(device: torch.device) -> float:
    """Seconds; with one CPU thread those this process spent computing, whatever else the machine does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (
        time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()
    )
