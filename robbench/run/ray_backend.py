"""Shards as Ray tasks, on this machine or a cluster.

Modules and data go to the object store once; a task carries the sample ids and its cell without them. Only the driver
writes. Ray restarts the tasks of a worker that died (`MAX_RETRIES`); rows reach the driver and the ledger once. Workers
on the CPU compute in one thread each, one worker per core: results are bit for bit those of the local backend in one
thread (OMP_NUM_THREADS=1), and equal up to rounding to those with more threads.
"""

import importlib
import io
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from robbench.core.device import versions
from robbench.core.errors import UserError
from robbench.core.foreign import cause
from robbench.core.stops import handlers_kept, remember_termination, reraise_stop
from robbench.run.cells import Cell
from robbench.run.shard_work import ShardFailure, ShardRows, ShardTask, ShardWork, record_failure

BackendName = Literal["local", "ray"]
MAX_RETRIES = 3
SMALLEST_SHARE = 1e-4  # Ray's unit of resources
IN_FLIGHT = 2  # tasks submitted per task that can run at once, so that no worker waits for the driver
CACHED_MODULES = 8
# First bytes of a gRPC connection, from client and server (RFC 9113, section 3.4): preface and empty SETTINGS frame.
HTTP2_GREETING, HTTP2_SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", b"\4"
# For a cluster that this run starts, read when Ray is imported: no usage statistics; ports on the loopback interface.
PRIVATE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
ObjectRef = Any  # ray.ObjectRef, whose package may be absent


@dataclass(frozen=True)
class RayOptions:
    """address: "auto" or "host:port" of a cluster; None for one on this machine, for this run. gpus_per_cell: GPUs per
    task; None for 1 where the cluster has some, else 0. device: --device as given."""

    address: str | None
    gpus_per_cell: float | None
    device: str


def ray_options(
    backend: BackendName, address: str | None, gpus_per_cell: float | None, device: str
) -> RayOptions | None:
    """The options of the Ray backend, None for the local one; `UserError` for options that the backend does not have,
    values out of range, or a missing Ray."""
    if backend == "local":
        for option, value in (("--ray-address", address), ("--gpus-per-cell", gpus_per_cell)):
            if value is not None:
                raise UserError(f"{option} {value} is for Ray; add --backend ray, or leave it out")
        return None
    if address not in (None, "auto"):
        _host_and_port(address or "")
    if gpus_per_cell is not None:
        _check_share(gpus_per_cell, device)
    if device.startswith("cuda:"):
        raise UserError(f"--device {device!r} with --backend ray: Ray hands out the GPUs; give --device cuda")
    if address is None:
        os.environ.update(PRIVATE | os.environ)
    import_ray()
    return RayOptions(address, gpus_per_cell, device)


def import_ray() -> Any:
    """The package ray; `UserError` where it is absent or broken."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError(
            f"--backend ray needs the package ray ({error}); install the extra: pip install 'robbench[ray]', "
            f"or leave --backend out"
        ) from error


def _check_share(share: float, device: str) -> None:
    fits = SMALLEST_SHARE <= share <= 1 or (share > 1 and share.is_integer())
    if not fits:
        raise UserError(
            f"--gpus-per-cell {share:g} is no share of GPUs; give one from {SMALLEST_SHARE:g} to 1, "
            f"as in 0.25, or a whole number"
        )
    if device == "cpu":
        raise UserError(f"--gpus-per-cell {share:g} with --device cpu uses no GPU; leave one of them out")


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--ray-address {address!r} is no address of a cluster; give auto or host:port, as in 10.0.0.1:6379"
        )
    return host.strip("[]"), int(port)


@contextmanager
def open_ray_backend(options: RayOptions, work: ShardWork) -> Iterator["RayBackend"]:
    """A backend on the requested cluster; where this process already runs Ray, that is used and left running.

    On exit running tasks are cancelled, and a cluster started here is stopped. `UserError` when nothing answers at the
    address, or when the cluster lacks what tasks need.
    """
    ray = import_ray()
    ours = not ray.is_initialized()
    try:
        if ours:
            _connect(ray, options.address)
        backend = RayBackend(ray, _places(options, ray.nodes()), work)
        try:
            yield backend
        finally:
            backend.cancel()
    finally:
        if ours:
            with handlers_kept():
                ray.shutdown()


def _connect(ray: Any, asked: str | None) -> None:
    address = os.environ.get("RAY_ADDRESS", "auto") if asked == "auto" else asked
    if address is not None and address != "auto":
        _require_answer(address)
    place = {"address": "local", "include_dashboard": False} if address is None else {"address": address}
    try:
        with warnings.catch_warnings(), handlers_kept():  # Ray would end the program at SIGTERM by itself
            warnings.simplefilter("ignore")  # of Ray about itself: nothing the user could act on
            ray.init(**place, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        what = "Ray does not start on this machine" if address is None else f"--ray-address {address!r}"
        raise UserError(
            f"{what}: {' '.join(str(error).split())[:160].rstrip('.')}; start a cluster with ray start --head and "
            f"name it, or leave --backend ray out"
        ) from error


def _require_answer(address: str) -> None:
    """`UserError` unless a gRPC server answers at host:port; Ray itself would retry for minutes."""
    try:
        with socket.create_connection(_host_and_port(address), timeout=10) as connection:
            connection.sendall(HTTP2_GREETING)
            answer = b"" if "RAY_USE_TLS" in os.environ else connection.recv(4, socket.MSG_WAITALL)
        if "RAY_USE_TLS" not in os.environ and answer[3:] != HTTP2_SETTINGS:
            raise ConnectionError("it speaks another protocol")
    except OSError as error:
        raise UserError(
            f"--ray-address {address!r}: nothing answers there as Ray does ({error.strerror or error}); start a "
            f"cluster with ray start --head, or leave --ray-address out for one on this machine"
        ) from error


@dataclass(frozen=True)
class _Places:
    """gpus: per task. count: tasks that can run at once. device: of a task's modules."""

    gpus: float
    count: int
    device: torch.device


def _places(options: RayOptions, nodes: Sequence[dict[str, Any]]) -> _Places:
    """Resources per task, and how many tasks fit on the living nodes."""
    living = [node["Resources"] for node in nodes if node["Alive"]]
    most = max((node.get("GPU", 0.0) for node in living), default=0.0)
    asked = options.gpus_per_cell
    if not most and (asked is not None or options.device == "cuda"):
        option = f"--gpus-per-cell {asked:g}" if asked is not None else "--device cuda"
        raise UserError(f"{option}: the Ray cluster has no GPU; leave it out, or name another cluster")
    gpus = asked if asked is not None else float(most > 0 and options.device != "cpu")
    if gpus > most:
        raise UserError(
            f"--gpus-per-cell {gpus:g}: the largest node of the Ray cluster has {most:g}; give at most {most:g}"
        )
    count = sum(_count_tasks(node, gpus) for node in living)
    if not count:
        raise UserError(
            "no node of the Ray cluster has a CPU core for tasks; add one (ray start --address ...)"
        )
    return _Places(gpus, count, torch.device("cuda" if gpus else "cpu"))


def _count_tasks(node: dict[str, float], gpus: float) -> int:
    """Number of tasks of one core and `gpus` GPUs that fit on a node; a share below 1 is of a single GPU."""
    cores = int(node.get("CPU", 0.0))
    if not gpus:
        return cores
    present = node.get("GPU", 0.0)
    return min(cores, int(present) * int(1 / gpus + 1e-9) if gpus < 1 else int(present / gpus))


@dataclass(frozen=True)
class _Packed:
    """A pickle with its modules replaced by references to the object store."""

    payload: bytes
    modules: tuple[ObjectRef, ...]


@dataclass(frozen=True)
class _Shared:
    """Shared by all tasks of a run: reference to the packed `ShardWork`, its device, and the driver's versions."""

    work: ObjectRef
    device: str
    versions: dict[str, str]


class RayBackend:
    """Computes shards in Ray tasks."""

    longest_first = True

    def __init__(self, ray: Any, places: _Places, work: ShardWork) -> None:
        self._ray, self._limit = ray, IN_FLIGHT * places.count
        self._remote = ray.remote(num_cpus=1, num_gpus=places.gpus, max_retries=MAX_RETRIES)(compute_shard)
        self._modules: dict[int, tuple[nn.Module, ObjectRef]] = {}
        self._running: dict[ObjectRef, ShardTask] = {}
        packed = self._pack(work.on(places.device))
        self._shared = ray.put(_Shared(ray.put(packed), str(places.device), _select_versions(versions())))

    def results(self, tasks: Iterator[ShardTask]) -> Iterator[tuple[ShardTask, ShardRows | ShardFailure]]:
        """Every task with its result as it arrives; further tasks are taken after the caller has processed it."""
        self._fill(tasks)
        while self._running:
            done, _ = self._ray.wait(list(self._running), num_returns=1)
            task = self._running.pop(done[0])
            yield task, self._result(done[0])
            self._fill(tasks)

    def changed(self, cell: Cell) -> bool:
        """No: attacks run in other processes."""
        return False

    def cancel(self) -> None:
        """Stop running tasks, and free the object store."""
        for ref in self._running:
            self._ray.cancel(ref, force=True)
        self._running.clear()
        self._modules.clear()
        self._shared = None

    def _fill(self, tasks: Iterator[ShardTask]) -> None:
        while len(self._running) < self._limit and (task := next(tasks, None)) is not None:
            self._running[self._submit(task)] = task

    def _submit(self, task: ShardTask) -> ObjectRef:
        try:
            packed = self._pack(task.cell)
        except BaseException as error:  # pickling runs code of the model's and the attack's
            reraise_stop(error)
            unsent = UserError(
                f"the cell cannot be sent to a Ray worker ({cause(error)}); run it without --backend ray"
            )
            return self._ray.put(record_failure(unsent))
        return self._remote.remote([self._shared], packed, task.ids)

    def _result(self, ref: ObjectRef) -> ShardRows | ShardFailure:
        errors = self._ray.exceptions
        try:
            result: ShardRows | ShardFailure = self._ray.get(ref)
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            died = UserError(
                f"its Ray worker died {MAX_RETRIES + 1} times ({' '.join(str(error).split())[:120]}); if for lack of "
                f"memory, give a smaller --batch-size"
            )
            return record_failure(died)
        except errors.RayError as error:
            return record_failure(error)
        return result

    def _pack(self, value: Any) -> _Packed:
        stream, refs = io.BytesIO(), list[ObjectRef]()

        def place(module: nn.Module) -> int:
            ref = self._store_module(module)
            if ref not in refs:
                refs.append(ref)
            return refs.index(ref)

        _ModulePickler(stream, place).dump(value)
        return _Packed(stream.getvalue(), tuple(refs))

    def _store_module(self, module: nn.Module) -> ObjectRef:
        """Reference to the module in the object store, put there once; the module is kept so that its id stays
        unique."""
        if id(module) not in self._modules:
            stream = io.BytesIO()
            torch.save(module, stream)
            self._modules[id(module)] = (module, self._ray.put(stream.getvalue()))
        return self._modules[id(module)][1]


class _ModulePickler(pickle.Pickler):
    """Pickles everything but modules, which become the numbers that `place` returns."""

    def __init__(self, stream: io.BytesIO, place: Callable[[nn.Module], int]) -> None:
        super().__init__(stream, protocol=5)
        self._place = place

    def persistent_id(self, value: Any) -> int | None:
        return self._place(value) if isinstance(value, nn.Module) else None


def compute_shard(
    shared: Sequence[ObjectRef], cell: _Packed, ids: tuple[int, ...]
) -> ShardRows | ShardFailure:
    """The Ray task. shared: one reference to `_Shared`, in a list so that Ray does not fetch it for every task."""
    try:
        work, device = _prepare(shared[0])
        unpacked: Cell = _unpack(cell, device)
    except BaseException as error:  # unpickling runs code of the model's and the attack's
        reraise_stop(error)
        return record_failure(error)
    return work.shard(unpacked, ids)


@lru_cache(maxsize=1)
def _prepare(shared: ObjectRef) -> tuple[ShardWork, str]:
    """The run's `ShardWork`, fetched once per process, and its device; sets the process to one thread."""
    from robbench.core.allocator import tune_allocator

    torch.set_num_threads(1)
    tune_allocator()
    remember_termination()
    ray = import_ray()
    here, common = _select_versions(versions()), ray.get(shared)
    for package, requested in common.versions.items():
        if here[package] != requested:
            raise UserError(
                f"a Ray node has {package} {here[package]}, and {requested} is here; install the same on every node"
            )
    return _unpack(ray.get(common.work), common.device), common.device


def _select_versions(found: dict[str, str]) -> dict[str, str]:
    """Versions that must agree; the suffix after a plus only names the CUDA version of a PyTorch build."""
    return {package: found[package].partition("+")[0] for package in ("robbench", "torch")}


def _unpack(packed: _Packed, device: str) -> Any:
    return _ModuleUnpickler(packed, device).load()


class _ModuleUnpickler(pickle.Unpickler):
    def __init__(self, packed: _Packed, device: str) -> None:
        super().__init__(io.BytesIO(packed.payload))
        self._refs, self._device = packed.modules, device

    def persistent_load(self, place: int) -> nn.Module:
        return _module(self._refs[place], self._device)


@lru_cache(maxsize=CACHED_MODULES)
def _module(ref: ObjectRef, device: str) -> nn.Module:
    """A module of the object store on `device`; the last ones in use are cached."""
    stream = io.BytesIO(import_ray().get(ref))
    # Written by the driver of this run: its own verified modules.
    module: nn.Module = torch.load(stream, map_location=device, weights_only=False)
    return module
