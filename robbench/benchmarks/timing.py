"""Comparable times: one clock, interleaved rounds, ratios within rounds."""

import os
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from robbench.core.device import now

Key = TypeVar("Key")
Found = TypeVar("Found")
Times = dict[str, list[float]]
Quartiles = list[float]  # lower quartile, median, upper quartile
Tell = Callable[[str], None]


def ignore(line: str) -> None:
    """Ignore a line of progress."""


def time_call(call: Callable[[], Found], device: torch.device) -> tuple[Found, float]:
    """The result of `call`, and its seconds."""
    begun = now(device)
    found = call()
    return found, now(device) - begun


def interleave(
    runs: Mapping[Key, Callable[[], Any]], rounds: int, device: torch.device, tell: Tell
) -> dict[Key, list[float]]:
    """Seconds of every run, one per round, in random order per round. The caller has warmed the runs up."""
    return in_turns(list(runs), lambda name: time_call(runs[name], device)[1], rounds, tell)


def in_turns(
    keys: Sequence[Key], seconds: Callable[[Key], float], rounds: int, tell: Tell
) -> dict[Key, list[float]]:
    """`seconds` of every key, one per round, in random order per round."""
    times: dict[Key, list[float]] = {key: [] for key in keys}
    order, turns = random.Random(0), list(keys)
    for done in range(rounds):
        order.shuffle(turns)
        for key in turns:
            times[key].append(seconds(key))
        tell(f"round {done + 1} of {rounds}")
    return times


def quartiles(values: Sequence[float]) -> Quartiles:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def quotient(above: Sequence[float], below: Sequence[float]) -> Quartiles:
    """Quartiles of the quotients of times of the same round."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def processor(device: torch.device) -> str:
    """The name of the GPU from CUDA, of the CPU from Linux, elsewhere the machine type from Python."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak of the bytes that PyTorch allocates on `device` in `call`. A first call, which may fill caches, is not
    measured."""
    call()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler on stderr
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    allocated = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak
