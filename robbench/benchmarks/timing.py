"""Times that can be compared: one clock, interleaved rounds, ratios of the same round."""

import os
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from robbench.core.device import now

Times = dict[str, list[float]]


def interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, tell: Callable[[str], None]
) -> Times:
    """Seconds of every run, one a round, in an order drawn anew each round. The runs have been warmed up before."""
    times: Times = {name: [] for name in runs}
    order, turns = random.Random(0), list(runs)
    for done in range(rounds):
        order.shuffle(turns)
        for name in turns:
            begun = now(device)
            runs[name]()
            times[name].append(now(device) - begun)
        tell(f"round {done + 1} of {rounds}")
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def quotient(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Quartiles of the quotients of times of the same round."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def spread(values: Sequence[float] | None, digits: int) -> str:
    """Quartiles as "median [lower, upper]"."""
    if values is None:
        return "not measured"
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def processor(device: torch.device) -> str:
    """The device's name: a GPU's as CUDA has it, a CPU's as Linux has it, elsewhere what Python knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak of the bytes PyTorch holds on `device` while `call` runs, beyond those held before. The first call, which
    may fill caches, is not measured."""
    call()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell stderr when it starts and stops
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
