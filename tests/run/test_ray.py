"""Runs on a real Ray cluster of two workers: the local backend's rows, whatever dies on the way."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from tiny_models import saved_model
from torch import Tensor, nn

from robbench.attacks import Attack, Cost
from robbench.attacks.base import Candidates, Task
from robbench.attacks.named import ATTACKS
from robbench.attacks.victim import Victim
from robbench.cards import Architecture
from robbench.cli.app import main
from robbench.cli.run import run_matrix
from robbench.core.errors import UserError
from robbench.models.flows.glow import Glow
from robbench.run import ray_backend
from robbench.run.executor import LocalBackend, execute, open_backend, shard_work
from robbench.run.plan import build_plan
from robbench.run.ray_backend import RayOptions
from robbench.run.request import RunRequest
from robbench.store.folder import open_ledger
from robbench.store.ledger import load_run
from robbench.store.records import CellRecord

SPECS = """
name: for-ray
space: image
norm: linf
description: Attacks that take long enough to be killed, depend on their batch, or fail.
budgets: {digits: {epsilon: 0.03}}
attacks:
  slow-pgd: {algorithm: pgd, parameters: {steps: 80, restarts: 2}}
  quick-aa: {algorithm: autoattack-reference, parameters: {components: [apgd-ce], iterations: 3}}
"""
FAILING = """
name: failing
space: image
norm: linf
description: An attack that raises on one sample.
budgets: {digits: {epsilon: 0.03}}
attacks:
  failing: {algorithm: fails-on-one}
"""
WORKERS = 2
N = 124  # two blocks of samples


@dataclass(frozen=True)
class Cluster:
    """address: host:port of its GCS. raylet: process id of the parent of all workers."""

    address: str
    raylet: int

    def busy(self) -> list[int]:
        """Process ids of the workers that are computing a shard."""
        return [pid for pid in _children(self.raylet) if _title(pid).startswith("ray::compute_shard")]


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if find_spec("ray") is None:
        pytest.skip("ray is absent: pip install 'robbench[ray]'")
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc to find worker processes in")
    here = Path(
        __file__
    ).parent  # workers unpickle attacks of this module, which imports helpers beside its folder
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    settings = {**ray_backend.PRIVATE, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    handler = signal.getsignal(signal.SIGTERM)
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        ray.init(
            address="local",
            num_cpus=WORKERS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    raylet = ray.get(ray.remote(lambda: os.getppid()).remote())
    yield Cluster(ray.get_runtime_context().gcs_address, raylet)
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)  # Ray leaves its own in Python, and the system's default below it
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the workers: bit identity needs equal thread counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def zoo(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-a, tiny-b and a flow, "tiny-flow"."""
    folder = tmp_path_factory.mktemp("ray") / "zoo"
    shutil.copytree(tiny_zoo, folder)
    arguments = {"levels": 2, "steps": 1, "width": 8}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        flow = Glow((1, 8, 8), 17, **arguments)
        flow.initialize(torch.rand(64, 1, 8, 8))
    saved_model(
        folder, "tiny-flow", flow, kind="flow", defense="clean", classes=None, grey_levels=17,
        architecture=Architecture(name="glow", arguments=arguments),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("specs")
    (folder / "for-ray.yaml").write_text(SPECS)
    return folder


def request(zoo: Path, **changes: object) -> RunRequest:
    fields = {"attacks": ("fgsm", "pgd10"), "models": ("tiny-a",), "zoo": zoo, "n": N, "device": "cpu"}
    return RunRequest(**(fields | changes))  # type: ignore[arg-type]


def run_both(asked: RunRequest, folder: Path) -> tuple[Path, Path]:
    """The same run on both backends; the two folders."""
    for name in ("local", "ray"):
        run_matrix(replace(asked, backend=name), folder / name)  # type: ignore[arg-type]
    return folder / "local", folder / "ray"


def shards(folder: Path) -> dict[Path, pa.Table]:
    """Every shard by its place in the folder."""
    found = sorted(folder.glob("cells/*/shard-*.parquet"))
    return {path.relative_to(folder): pq.read_table(path).replace_schema_metadata() for path in found}


def inodes(folder: Path) -> dict[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in sorted(folder.glob("cells/*/shard-*.parquet"))}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def assert_same_rows(local: Path, other: Path, count: int) -> None:
    """The same shards with the same rows in every column, tables included, and no sample twice."""
    expected, found = shards(local), shards(other)
    assert len(expected) == count
    assert found == expected
    for name in ("leaderboard.csv", "leaderboard-wide.csv", "leaderboard.md"):
        assert (other / name).read_bytes() == (local / name).read_bytes()
    for cell in load_run(other).cells:
        assert cell.rows["sample_id"].is_unique
        assert cell.cell.status == "ok"


def command(zoo: Path, folder: Path, specs: Path, *more: str) -> list[str]:
    options = ["--model", "tiny-a,tiny-b", "--attacks", "slow-pgd", "--zoo", zoo, "--threat-models", specs]
    options += ["--out", folder, "--device", "cpu", "--backend", "ray", *more]
    return [sys.executable, "-m", "robbench", "run", *map(str, options)]


def slow(zoo: Path, specs: Path, **changes: object) -> RunRequest:
    """What `command` asks for."""
    fields = {"attacks": ("slow-pgd",), "models": ("tiny-a", "tiny-b"), "threat_models": specs, "n": None}
    return request(zoo, **(fields | changes))


@pytest.fixture(scope="module")
def slow_alone(zoo: Path, specs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `slow`, computed by the local backend."""
    folder = tmp_path_factory.mktemp("alone")
    run_matrix(slow(zoo, specs), folder)
    return folder


def started_until_shards(arguments: list[str], folder: Path, count: int) -> subprocess.Popen[str]:
    unset = () if "--ray-address" in arguments else ray_backend.PRIVATE.keys()
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a background job's children ignore it
    )
    wait_for(lambda: len(inodes(folder)) >= count or process.poll() is not None, 120)
    assert process.poll() is None, process.communicate()
    return process


def wait_for(condition: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -------------------------------------------------------------------------------------------------- same rows
def test_classifiers_latent_attacks_and_flows_give_the_local_rows(
    cluster: Cluster, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three cells, with bits/dim of the classifier's. Modules are put once, tasks in flight are bounded, a second run
    computes nothing."""
    import ray

    puts, in_flight = [], []
    put, wait = ray.put, ray.wait
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or put(value))
    monkeypatch.setattr(
        ray, "wait", lambda refs, **options: in_flight.append(len(refs)) or wait(refs, **options)
    )
    asked = request(
        zoo,
        attacks=("pgd10", "jsa10", "nll-in"),
        models=("tiny-a", "tiny-flow"),
        flow=None,
        keep_examples=40,
        likelihood_dtype="float64",
    )
    local, other = run_both(asked, tmp_path)
    assert_same_rows(local, other, 3 * 2)
    # The classifier; the flow of bits/dim and latent attacks; the attacked flow in float32 and in float64.
    assert len([value for value in puts if isinstance(value, bytes)]) == 4
    assert max(in_flight) == 2 * WORKERS
    before = inodes(other)
    run_matrix(replace(asked, backend="ray"), other)
    assert inodes(other) == before


@pytest.mark.slow
def test_batch_dependent_attacks_are_computed_in_whole_blocks(
    cluster: Cluster, zoo: Path, specs: Path, tmp_path: Path
) -> None:
    asked = request(zoo, attacks=("quick-aa",), threat_models=specs)
    run_both(replace(asked, n=100), tmp_path)
    local, other = run_both(asked, tmp_path)
    assert_same_rows(local, other, 2)
    aside = [sorted(path.name for path in folder.glob("superseded-1/cells/*/*")) for folder in (local, other)]
    assert aside[0] == aside[1]
    assert len(aside[0]) == 1


class FailsOnOne(Attack):
    """Fails on the 123rd sample drawn, which is in the second block."""

    @property
    def cost(self) -> Cost:
        return Cost(forwards=2, backwards=0)

    def fail(self) -> None:
        raise RuntimeError(f"sample {UNLUCKY}\nis unlucky")

    def search(self, victim: Victim, task: Task) -> Candidates:
        if UNLUCKY in task.ids.tolist():
            self.fail()
        zeros = torch.zeros(len(task.ids), dtype=torch.int64)
        return Candidates(task.x.clone(), zeros - 1, zeros, zeros, [self.spec.name] * len(zeros))


class KillsItsProcess(FailsOnOne):
    """What a model that needs more memory than there is looks like to Ray."""

    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def _unlucky() -> int:
    from robbench.data import load_dataset, sample_ids

    return sample_ids(load_dataset("digits").test, 123, 0)[-1]


UNLUCKY = _unlucky()


def test_a_failing_attack_fails_its_cell_only(
    cluster: Cluster, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS._entries, "fails-on-one", FailsOnOne)
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "failing.yaml").write_text(FAILING)
    asked = request(zoo, attacks=("failing", "fgsm"), threat_models=tmp_path / "specs")
    local, other = run_both(asked, tmp_path)
    records = []
    for folder in (local, other):
        failing, fine = load_run(folder).cells
        assert failing.cell.details.splitlines()[-1] == "is unlucky"
        records.append(failing.cell.model_copy(update={"seconds": 0.0, "details": ""}))
        assert (fine.cell.status, len(fine.rows)) == ("ok", N)
    assert records[0] == records[1]
    assert (records[1].status, records[1].error) == ("failed", f"RuntimeError: sample {UNLUCKY} is unlucky")
    expected, found = shards(local), shards(other)
    assert len(expected) == 1 + 2, "blocks before the failure stay; Ray may have finished one after it"
    assert {path: found.get(path) for path in expected} == expected


def test_a_cell_that_cannot_be_sent_fails_alone(cluster: Cluster, zoo: Path, tmp_path: Path) -> None:
    class Unsendable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10]

    plan = build_plan(request(zoo, attacks=("fgsm",), models=("tiny-a", "tiny-b"), n=20, backend="ray"))
    first, second = plan.cells
    broken = replace(first, model=replace(first.model, module=Unsendable()))  # type: ignore[call-arg, attr-defined]
    records = executed(replace(plan, cells=(broken, second)), tmp_path / "run")
    assert [record.status for record in records] == ["failed", "ok"]
    assert records[0].error is not None
    assert "Unsendable" in records[0].error
    assert "without --backend ray" in records[0].error


def test_nodes_with_another_version_are_refused(
    cluster: Cluster, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_backend, "versions", lambda: {"robbench": "0.0.1", "torch": torch.__version__})
    plan = build_plan(request(zoo, attacks=("fgsm",), n=20, backend="ray"))
    (record,) = executed(plan, tmp_path / "run")
    assert record.status == "failed"
    assert record.error is not None
    assert "a Ray node has robbench" in record.error
    assert "0.0.1 is here" in record.error


# ------------------------------------------------------------------------------------------------- scheduling
class Events:
    """A progress that only remembers."""

    def __init__(self) -> None:
        self.begun: list[int] = []

    def on_start(self, cell: int, record: CellRecord, done: int) -> None:
        self.begun.append(cell)

    def on_advance(self, cell: int, done: int, score: str) -> None: ...

    def on_end(self, cell: int, record: CellRecord, done: int, score: str) -> None: ...

    def message(self, line: str) -> None: ...


def executed(plan, folder: Path, backend=None, events: Events | None = None) -> list[CellRecord]:
    with open_backend(plan) as made, open_ledger(folder, plan.run, fresh=False) as ledger:
        return execute(plan, ledger, events or Events(), backend or made)


def test_longest_expected_cells_first(tiny_zoo: Path, tmp_path: Path) -> None:
    """By model calls still to make: half of pgd20 is in the ledger, and all of pgd10-l2 to do, which comes first."""
    asked = request(tiny_zoo, attacks=("fgsm", "pgd20", "pgd10-l2"), n=240)
    plan, events = build_plan(asked), Events()
    costs = [cell.cost.forwards + cell.cost.backwards for cell in plan.cells]
    assert costs == [4, 42, 22]
    executed(plan, tmp_path, events=events)
    assert events.begun == [0, 1, 2], "the local backend keeps the order of the plan"
    halved, whole = (plan.cells[number].record.hash[:16] for number in (1, 2))
    for path in (*tmp_path.glob(f"cells/{halved}/shard-0001-*"), *tmp_path.glob(f"cells/{whole}/shard-*")):
        path.unlink()
    longest = Events()
    executed(plan, tmp_path, LocalBackend(shard_work(plan), longest_first=True), longest)
    assert longest.begun == [0, 2, 1], "a complete cell needs no scheduling; 240 x 22 is more than 120 x 42"


@pytest.mark.parametrize(
    ("options", "nodes", "expected"),
    [
        (("auto", None), [{"CPU": 4.0}], (0.0, 4, "cpu")),
        (("auto", None), [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 8.0}], (1.0, 2, "cuda")),
        (("cuda", 0.25), [{"CPU": 16.0, "GPU": 2.0}], (0.25, 8, "cuda")),
        (("cuda", 0.4), [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}], (0.4, 5, "cuda")),
        (("auto", 2.0), [{"CPU": 16.0, "GPU": 5.0}], (2.0, 2, "cuda")),
        (("cpu", None), [{"CPU": 4.0, "GPU": 2.0}], (0.0, 4, "cpu")),
    ],
)
def test_places_for_tasks(options, nodes, expected) -> None:
    device, share = options
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    living = [{"Alive": True, "Resources": node} for node in nodes]
    places = ray_backend._places(RayOptions(None, share, device), [dead, *living])
    assert (places.gpus, places.count, places.device.type) == expected


@pytest.mark.parametrize(
    ("device", "share", "node", "words"),
    [
        ("auto", 0.5, {"CPU": 4.0}, "--gpus-per-cell 0.5: the Ray cluster has no GPU"),
        ("cuda", None, {"CPU": 4.0}, "--device cuda: the Ray cluster has no GPU"),
        ("auto", 4.0, {"CPU": 4.0, "GPU": 2.0}, "the largest node of the Ray cluster has 2"),
        ("auto", None, {"CPU": 0.0}, "has a CPU core"),
    ],
)
def test_clusters_that_cannot_take_the_tasks(device, share, node, words) -> None:
    with pytest.raises(UserError, match=words):
        ray_backend._places(RayOptions(None, share, device), [{"Alive": True, "Resources": node}])


@pytest.mark.slow
def test_a_thousand_tiny_cells_without_growth_of_memory(cluster: Cluster, zoo: Path, tmp_path: Path) -> None:
    budgets = tuple(0.0001 * (number + 1) for number in range(1000))
    plan = build_plan(request(zoo, attacks=("fgsm",), epsilons=budgets, n=5, backend="ray"))

    class Watched(Events):
        sizes: tuple[list[int], ...] = ([], [])

        def on_end(self, cell: int, record: CellRecord, done: int, score: str) -> None:
            self.sizes[0].append(_resident(os.getpid()))
            workers = [pid for pid in _children(cluster.raylet) if _title(pid).startswith("ray::")]
            self.sizes[1].append(max(map(_resident, workers)))

    events = Watched()
    records = executed(plan, tmp_path / "run", events=events)
    assert {record.status for record in records} == {"ok"}
    for sizes in events.sizes:
        assert len(sizes) == 1000
        assert max(sizes[900:]) - max(sizes[:100]) < 32, "MiB"


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except OSError:
        return 0


# ----------------------------------------------------------------------------------------------------- deaths
@pytest.mark.slow
def test_a_killed_worker_is_retried(
    cluster: Cluster,
    zoo: Path,
    specs: Path,
    slow_alone: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: inodes(tmp_path / "ray") and cluster.busy(), 120)
        time.sleep(0.1)  # well inside the attack
        killed.append(cluster.busy()[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert run_matrix(slow(zoo, specs, backend="ray"), tmp_path / "ray") == 0
    killer.join()
    assert len(killed) == 1
    assert capfd.readouterr().err == "", "nothing that would garble the progress"
    assert_same_rows(slow_alone, tmp_path / "ray", 6)


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_fails_its_cell_only(
    cluster: Cluster, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTACKS._entries, "fails-on-one", KillsItsProcess)
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "failing.yaml").write_text(FAILING)
    asked = request(zoo, attacks=("failing", "pgd10"), threat_models=tmp_path / "specs", backend="ray")
    assert run_matrix(asked, tmp_path / "run") == 1
    failing, fine = load_run(tmp_path / "run").cells
    assert failing.cell.error is not None
    assert failing.cell.error.startswith("its Ray worker died 4 times")
    assert "--batch-size" in failing.cell.error
    assert len(failing.rows) == 120
    assert (fine.cell.status, len(fine.rows)) == ("ok", N)


@pytest.mark.slow
def test_a_killed_driver_resumes(
    cluster: Cluster, zoo: Path, specs: Path, slow_alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    process = started_until_shards(command(zoo, folder, specs, "--ray-address", cluster.address), folder, 2)
    process.kill()
    process.communicate()
    before = inodes(folder)
    assert 2 <= len(before) < 6
    run_matrix(slow(zoo, specs, backend="ray"), folder)
    after = inodes(folder)
    assert {path: after[path] for path in before} == before
    assert_same_rows(slow_alone, folder, 6)


@pytest.mark.slow
def test_ctrl_c_cancels_and_says_how_to_resume(
    cluster: Cluster, zoo: Path, specs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = started_until_shards(command(zoo, folder, specs, "--ray-address", cluster.address), folder, 1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "slow-pgd: 360 samples" in output
    lines = errors.strip().splitlines()
    assert len(lines) == 1
    assert "run the same command again to resume" in lines[0]
    wait_for(lambda: not cluster.busy(), 20)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_cluster_of_its_own_ends_with_the_driver(
    how: signal.Signals, cluster: Cluster, zoo: Path, specs: Path, tmp_path: Path
) -> None:
    """Without --ray-address: workers, raylet and GCS. Ray's agents take up to a minute after a kill -9. All listen on
    the loopback interface only."""
    folder = tmp_path / "run"
    process = started_until_shards(command(zoo, folder, specs), folder, 1)
    family = _descendants(process.pid)
    family = [pid for pid in family if "Agent" not in _title(pid)]
    assert any("raylet" in _title(pid) for pid in family)
    assert {address for pid in family for address in _listening(pid)} <= {"127.0.0.1", "::1"}
    assert any(_listening(pid) for pid in family)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    assert "Traceback" not in errors
    wait_for(lambda: not any(_title(pid) for pid in family), 60)


def _listening(pid: int) -> set[str]:
    """IP addresses that a process listens on (proc(5): words in host order, state 0A)."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                address = ip_address(packed)
                mapped = getattr(address, "ipv4_mapped", None)
                found.add(str(mapped or address))
    return found


def _descendants(pid: int) -> list[int]:
    children = _children(pid)
    return children + [each for child in children for each in _descendants(child)]


# -------------------------------------------------------------------------------------------------- bad input
def refused(*options: object) -> str:
    """The one line that `robbench run` with these options ends with."""
    arguments = ["run", "--model", "digits-at", "--attacks", "fgsm", "--n", "5", *map(str, options)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_without_ray_the_extra_is_named(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused("--backend", "ray")
    assert "--backend ray" in line
    assert "pip install 'robbench[ray]'" in line
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ray-address", "auto"), ["--ray-address auto", "--backend ray"]),
        (("--gpus-per-cell", "0.5"), ["--gpus-per-cell 0.5", "--backend ray"]),
        (("--backend", "ray", "--gpus-per-cell", "0"), ["--gpus-per-cell 0", "0.25"]),
        (("--backend", "ray", "--gpus-per-cell", "-1"), ["--gpus-per-cell -1", "0.25"]),
        (("--backend", "ray", "--gpus-per-cell", "nan"), ["--gpus-per-cell", "'nan' is no finite number"]),
        (("--backend", "ray", "--gpus-per-cell", "inf"), ["--gpus-per-cell", "'inf' is no finite number"]),
        (("--backend", "ray", "--gpus-per-cell", "1.5"), ["--gpus-per-cell 1.5", "whole number"]),
        (
            ("--backend", "ray", "--gpus-per-cell", "1", "--device", "cpu"),
            ["--gpus-per-cell 1", "--device cpu"],
        ),
        (("--backend", "ray", "--device", "cuda:1"), ["cuda:1", "--device cuda"]),
        (("--backend", "ray", "--ray-address", "here"), ["'here'", "host:port"]),
        (("--backend", "ray", "--ray-address", "ray://here:1"), ["'ray://here:1'", "host:port"]),
        (("--backend", "ray", "--ray-address", "here:0"), ["'here:0'", "host:port"]),
    ],
)
def test_options_that_make_no_sense(in_tmp: Path, options, words) -> None:
    line = refused(*options)
    assert all(word in line for word in words), line
    assert not list(in_tmp.iterdir())


def test_a_gpu_where_the_cluster_has_none(cluster: Cluster, in_tmp: Path) -> None:
    assert "the Ray cluster has no GPU" in refused("--backend", "ray", "--gpus-per-cell", "0.5")
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_nothing_answers_as_ray_does(answer: bytes | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def reply() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer or b"")

        thread = threading.Thread(target=reply)
        if answer is None:
            server.close()
        else:
            thread.start()
        with pytest.raises(UserError, match=f"'127.0.0.1:{port}'.*nothing answers.*ray start --head"):
            ray_backend._require_answer(f"127.0.0.1:{port}")
        if answer is not None:
            thread.join()


def test_a_cluster_answers(cluster: Cluster) -> None:
    ray_backend._require_answer(cluster.address)


def test_dry_run_is_the_same_for_both_backends(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("ray") is None:
        pytest.skip("ray is absent: pip install 'robbench[ray]'")
    from robbench.cli.run import dry_run_table

    monkeypatch.setenv("COLUMNS", "200")
    printed = []
    for backend in ("local", "ray"):
        dry_run_table(request(zoo, n=250, backend=backend), tmp_path / "run")
        printed.append(capsys.readouterr().out)
    counts = [[line.split()[:-1] for line in text.splitlines() if "pgd10" in line] for text in printed]
    assert counts[0] == counts[1]  # the last column is hours, measured each time
    assert any(line[-5:] == ["0", "12", "10", "3,000", "2,500"] for line in counts[0])
