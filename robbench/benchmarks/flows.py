"""Decode + backward to the latents: robbench's frozen flows against FrEIA, normflows and nflows, same weights.

    robbench bench flows --out reports/benchmarks              # writes flows.json and flows.md
    robbench bench flows --case small --rounds 10 --profile    # a quick look, and where the time goes

One process with tuned malloc (`core.allocator`) runs all implementations. With glibc's default malloc each has a
process of its own, since the state of the heap decides whether glibc returns memory. In each round every implementation
runs once unmeasured and once measured in each of its processes, in random order. A ratio is the median over rounds of
the quotient of two times of the same round, shown with quartiles. With one thread, times are CPU times of the process,
so that other load on the machine matters only through shared caches and clocks.

Before any timing every implementation must agree with robbench's trainable flow in float64, in outputs and gradients:
|difference| / |reference| (Euclidean) at most TOLERANCE of its dtype, first in float64, which shows that it is the same
function, then in float32 as timed, where a ReLU at 0 may flip. Otherwise nothing is timed.

Kinds: "frozen" is eval mode with requires_grad_(False) and the library's cache where it has one; "channels_last" the
same in that memory format; "naive" trainable parameters as constructed. Memory: bytes that autograd keeps between
decode and backward, each storage once, without weights.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from robbench.benchmarks.flow_peers import (
    CONDITIONAL,
    GLOW,
    Build,
    Decode,
    Levels,
    Peer,
    benchmark_conditional,
    benchmark_glow,
)
from robbench.benchmarks.flow_report import REFERENCE
from robbench.benchmarks.peers import available
from robbench.benchmarks.timing import Tell, Times, in_turns, processor, quartiles, quotient, time_call
from robbench.core.allocator import tune_allocator
from robbench.core.errors import UserError, unknown_name
from robbench.core.versions import installed_version
from robbench.models.flows import Flow
from robbench.models.flows.base import Memory

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


class Disagreement(Exception):
    """Two implementations that should be the same function are not, so that their times are not comparable."""


@dataclass(frozen=True)
class Case:
    """A comparison.

    Attributes:
        what: description of the flow.
        build: constructs it.
        batch: images per batch.
        rounds: number of measured rounds.
        peers: libraries that can express the flow.
        allocators: settings of malloc.
    """

    what: str
    build: Callable[[], Flow]
    batch: int
    rounds: int
    peers: dict[str, Build]
    allocators: tuple[str, ...] = ("tuned", "default")


CASES = {
    "small": Case(
        "Glow 3 levels x 8 steps x width 128 on 3x32x32",
        lambda: benchmark_glow(3, 8, 128, (3, 32, 32)),
        batch=16,
        rounds=40,
        peers=GLOW,
    ),
    "mlp": Case(
        "conditional coupling flow, 12 blocks x width 512 on 784 dimensions",
        lambda: benchmark_conditional(12, 512, (1, 28, 28)),
        batch=64,
        rounds=40,
        peers=CONDITIONAL,
    ),
    "paper": Case(
        "Glow 3 levels x 32 steps x width 512 on 3x32x32",
        lambda: benchmark_glow(3, 32, 512, (3, 32, 32)),
        batch=4,
        rounds=7,
        peers=GLOW,
        allocators=("tuned",),  # a process of its own for each would take too much memory
    ),
}


def case_named(name: str) -> Case:
    """The case called `name`; `UserError` for an unknown one."""
    if name not in CASES:
        raise unknown_name("case", name, CASES)
    return CASES[name]


@dataclass
class Bench:
    """Implementations of one function, ready to run.

    Attributes:
        levels: the decoded latents, fine to coarse.
        y: labels [n] of a conditional flow.
        cotangent: gradient at the images, which is propagated back.
        decoders: from latents and labels to images, by name.
        modules: with their weights, by name.
        reference: images and gradient of robbench's trainable flow in float64.
        absent: libraries that are not installed, and why.
    """

    levels: Levels
    y: Tensor | None
    cotangent: Tensor
    decoders: dict[str, Decode]
    modules: dict[str, nn.Module]
    reference: tuple[Tensor, Tensor]
    absent: dict[str, str] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Bench":
        """Everything on `device`, in place."""
        for module in self.modules.values():
            module.to(device)
        self.levels = tuple(level.to(device) for level in self.levels)
        self.y = None if self.y is None else self.y.to(device)
        self.cotangent = self.cotangent.to(device)
        self.reference = (self.reference[0].to(device), self.reference[1].to(device))
        return self

    def run(self, name: str) -> tuple[Tensor, Tensor]:
        """Decoded images and the gradient at the latents, flat."""
        return decode_and_backward(self.decoders[name], self.levels, self.y, self.cotangent)


def decode_and_backward(
    decode: Decode, levels: Levels, y: Tensor | None, cotangent: Tensor
) -> tuple[Tensor, Tensor]:
    """Decoded images and the gradient of <images, cotangent> at the latents [N, D], flat."""
    leaves = tuple(level.detach().requires_grad_() for level in levels)
    out = decode(leaves, y)
    torch.autograd.backward(out, cotangent)
    return out.detach(), torch.cat([leaf.grad.flatten(1) for leaf in leaves if leaf.grad is not None], dim=1)


def prepare(case: Case, dtype: torch.dtype = torch.float32, only: str | None = None) -> Bench:
    """Build every implementation (or `only` one) in `dtype` at the same weights; latents are those of random images."""
    exact = case.build().eval().double().requires_grad_(False)
    flow = copy.deepcopy(exact).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(case.batch, *flow.input_shape, generator=generator)
    y = torch.arange(case.batch) % flow.label_classes if flow.label_classes else None
    latents, _ = exact.encode(x, y)
    cotangent = torch.randn(x.shape, generator=generator, dtype=dtype)
    bench = Bench(
        levels=tuple(level.to(dtype, memory_format=torch.contiguous_format) for level in latents.levels),
        y=y,
        cotangent=cotangent,
        decoders={},
        modules={},
        reference=decode_and_backward(exact.transform.decode, latents.levels, y, cotangent.double()),
    )
    for memory in (memory for memory in get_args(Memory) if only in (None, f"robbench {memory}")):
        frozen = flow.freeze(dtype, memory)
        bench.decoders[f"robbench {memory}"] = frozen.transform.decode
        bench.modules[f"robbench {memory}"] = frozen
    with default_dtype(dtype):
        builds = {name: partial(_kinds, build, flow, name, only) for name, build in case.peers.items()}
        found, bench.absent = available(builds, {})
    for name, peer in (item for kinds in found.values() for item in kinds.items()):
        bench.decoders[name], bench.modules[name] = peer.decode, peer
    return bench


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, `dtype` is PyTorch's default dtype, in which the libraries create some tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _kinds(build: Build, flow: Flow, library: str, only: str | None) -> dict[str, Peer]:
    """The library's decoder as each requested kind, by name."""
    possible = ("frozen", "naive") if flow.label_classes else ("frozen", "channels_last", "naive")
    found: dict[str, Peer] = {}
    for kind in (kind for kind in possible if only in (None, f"{library} {kind}")):
        peer = build(flow, kind != "naive").eval()
        if kind != "naive":
            peer.requires_grad_(False)
        if kind == "channels_last":
            peer.to(memory_format=torch.channels_last)
        found[f"{library} {kind}"] = peer
    return found


def deviations(bench: Bench) -> dict[str, float]:
    """Relative deviation of outputs or gradients, whichever is larger; `Disagreement` when one is too large."""
    dtype, found = bench.cotangent.dtype, {}
    for name in bench.decoders:
        with default_dtype(dtype):
            pairs = zip(bench.run(name), bench.reference, strict=True)
        found[name] = max(float((ours - exact).norm() / exact.norm()) for ours, exact in pairs)
        if not found[name] <= TOLERANCE[dtype]:  # NaN disagrees as well
            raise Disagreement(
                f"{name} in {dtype} deviates from the reference by {found[name]:.1e}, more than "
                f"{TOLERANCE[dtype]:.0e}: no ratio is printed"
            )
    return found


def saved_bytes(bench: Bench, name: str) -> int:
    """Bytes that autograd keeps between decode and backward."""
    module = bench.modules[name]
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        leaves = tuple(level.detach().requires_grad_() for level in bench.levels)
        out = bench.decoders[name](leaves, bench.y)
    torch.autograd.backward(out, bench.cotangent)
    return sum(sizes.values())


def serve(case: Case, threads: int, only: str | None = None) -> None:
    """A worker process: prints its implementations, then times each whose name it reads."""
    torch.set_num_threads(threads)
    state = tune_allocator().state
    try:
        exact = deviations(prepare(case, torch.float64, only))
        bench = prepare(case, only=only)
        report: dict[str, Any] = {"deviations": {"float64": exact, "float32": deviations(bench)}}
    except Disagreement as error:
        print(json.dumps({"disagreement": str(error)}), flush=True)
        return
    report["memory"] = {name: saved_bytes(bench, name) for name in bench.decoders}
    print(json.dumps(report | {"absent": bench.absent, "allocator": state}), flush=True)
    for line in sys.stdin:
        bench.run(line.strip())
        print(time_call(partial(bench.run, line.strip()), CPU)[1], flush=True)


class Worker:
    """A process that runs `serve`; about: its first output."""

    def __init__(self, case: str, allocator: str, threads: int, only: str | None = None) -> None:
        environment = os.environ | {"ROBBENCH_MALLOC": allocator, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "robbench.benchmarks.flows", case, str(threads)]
        self.process = subprocess.Popen(
            [*command, only] if only else command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about: dict[str, Any] = json.loads(self._line())
        if "disagreement" in self.about:
            self.close()
            raise Disagreement(self.about["disagreement"])

    def time(self, name: str) -> float:
        """Seconds of one run of an implementation."""
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise UserError(f"a worker ended with code {self.process.returncode}; its message is above")
        return line


def measure(case: str, rounds: int, threads: int, tell: Tell) -> dict[str, Any]:
    """Interleaved times of every implementation under each malloc, and the other content of the report."""
    shared = Worker(case, "tuned", threads)
    names = list(shared.about["memory"])
    workers = {("tuned", name): shared for name in names}

    def tell_case(line: str) -> None:
        tell(f"{case}: {line}")

    try:
        for name in names if "default" in CASES[case].allocators else []:
            workers["default", name] = Worker(case, "default", threads, only=name)
        seconds = in_turns(list(workers), lambda key: workers[key].time(key[1]), rounds, tell_case)
    finally:
        for worker in set(workers.values()):
            worker.close()
    times: dict[str, Times] = {}
    for (allocator, name), found in seconds.items():
        times.setdefault(allocator, {})[name] = found
    used = {allocator: worker.about["allocator"] for (allocator, _), worker in workers.items()}
    return _summary(case, rounds, times, shared.about) | {"allocators": used}


def _summary(case: str, rounds: int, times: dict[str, Times], about: dict[str, Any]) -> dict[str, Any]:
    reference = times["tuned"][REFERENCE]
    return {
        "flow": CASES[case].what,
        "batch": CASES[case].batch,
        "rounds": rounds,
        "seconds": {
            allocator: {name: quartiles(found) for name, found in of.items()}
            for allocator, of in times.items()
        },
        "ratio": {
            allocator: {name: quotient(found, of[REFERENCE]) for name, found in of.items()}
            for allocator, of in times.items()
        },
        "ratio_default_to_tuned_reference": {
            name: quotient(found, reference) for name, found in times.get("default", {}).items()
        },
        "memory_bytes": about["memory"],
        "deviations": about["deviations"],
        "absent": about["absent"],
    }


def profile_reference(case: Case, threads: int) -> str:
    """robbench's time by operator."""
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(threads)
    tune_allocator()
    bench = prepare(case)
    bench.run(REFERENCE)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(5):
            bench.run(REFERENCE)
    return str(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


def report(
    cases: Sequence[str], rounds: int | None, threads: int, command: str, tell: Tell
) -> dict[str, Any]:
    """Measure every case; `UserError` when two implementations are not the same function. rounds: None for each case's
    own number."""
    try:
        results = {name: measure(name, rounds or CASES[name].rounds, threads, tell) for name in cases}
    except Disagreement as error:
        raise UserError(f"refused: {error}") from None
    packages = ("torch", "FrEIA", "normflows", "nflows", "robbench")
    return {
        "command": command,
        "cpu": processor(CPU),
        "threads": threads,
        "tolerance": {str(dtype): limit for dtype, limit in TOLERANCE.items()},
        "versions": {package: installed_version(package) or "absent" for package in packages},
        "cases": results,
    }


if __name__ == "__main__":
    name, number, *one = sys.argv[1:]
    serve(CASES[name], int(number), *one)
