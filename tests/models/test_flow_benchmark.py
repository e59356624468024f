"""The flow benchmark at tiny sizes: the libraries are the same function, and no ratio is printed when they are not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from robbench.benchmarks import flows
from robbench.benchmarks.flow_report import markdown
from robbench.cli.app import main
from robbench.core.errors import UserError


def tiny(kind: str, **peers: object) -> object:
    """A case of a few thousand weights, with the libraries in `peers` alone."""
    build = {
        "glow": lambda: flows.benchmark_glow(2, 2, 6, (3, 8, 8)),
        "mlp": lambda: flows.benchmark_conditional(3, 8, (1, 4, 4)),
    }[kind]
    return flows.Case(f"tiny {kind}", build, batch=3, rounds=1, peers=peers)


@pytest.mark.parametrize(
    ("kind", "library"),
    [("glow", "FrEIA"), ("glow", "normflows"), ("glow", "nflows"), ("mlp", "FrEIA"), ("mlp", "nflows")],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_a_library_at_the_same_weights_is_the_same_function(kind: str, library: str) -> None:
    pytest.importorskip(library, reason=f"pip install {library}")
    peer = (flows.GLOW if kind == "glow" else flows.CONDITIONAL)[library]
    bench = flows.prepare(tiny(kind, **{library: peer}), torch.float64)
    found = flows.deviations(bench)
    assert {f"{library} frozen", f"{library} naive", "robbench none", "robbench invert"} <= set(found)
    assert max(found.values()) < 1e-9
    single = flows.prepare(tiny(kind, **{library: peer}))
    assert max(flows.deviations(single).values()) < 1e-3
    kept = {name: flows.saved_bytes(single, name) for name in single.decoders}
    assert kept["robbench invert"] < kept["robbench mask"] < kept["robbench none"]
    assert kept["robbench none"] <= kept[f"{library} naive"]


class Shifted(nn.Module):
    """A peer that is wrong by a small constant factor, in outputs and gradients alike, or only in one of them."""

    def __init__(self, flow: nn.Module, factor: float, gradient_only: bool) -> None:
        super().__init__()
        self.flow, self.factor, self.gradient_only = flow, factor, gradient_only

    def decode(self, levels: tuple[torch.Tensor, ...], y: torch.Tensor | None) -> torch.Tensor:
        out = self.flow.transform.decode(levels, y)
        wrong = self.factor * out
        return out.detach() + wrong - wrong.detach() if self.gradient_only else wrong


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 1 + 1e-8), (torch.float32, 1.01)])
def test_a_peer_that_differs_is_refused(gradient_only: bool, dtype: torch.dtype, factor: float) -> None:
    case = tiny("glow", wrong=lambda flow, _frozen: Shifted(flow, factor, gradient_only))
    with pytest.raises(flows.Disagreement, match=r"wrong frozen .* deviates .* no ratio is printed"):
        flows.deviations(flows.prepare(case, dtype))


def test_nan_is_refused() -> None:
    case = tiny("glow", wrong=lambda flow, _frozen: Shifted(flow, float("nan"), False))
    with pytest.raises(flows.Disagreement, match="deviates from the reference by nan"):
        flows.deviations(flows.prepare(case))


def test_a_refused_comparison_prints_no_ratio(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a worker prints when a peer differs, and what the command makes of it."""
    wrong = tiny("glow", wrong=lambda flow, _frozen: Shifted(flow, 1.01, False))
    monkeypatch.setitem(flows.CASES, "small", wrong)
    monkeypatch.setattr(flows, "tune_allocator", _state)
    flows.serve(wrong, torch.get_num_threads())
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"disagreement"}
    worker = [sys.executable, "-c", f"print({json.dumps(json.dumps(printed))})"]
    real = subprocess.Popen
    monkeypatch.setattr(flows.subprocess, "Popen", lambda _command, **how: real(worker, **how))
    result = CliRunner().invoke(main, ["bench", "flows", "--case", "small", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "Error: refused: wrong frozen" in result.output
    assert list(tmp_path.iterdir()) == []
    assert "|" not in result.output


def test_a_worker_is_a_process_of_its_own_and_times_what_it_is_asked_for() -> None:
    """The real worker's command line, with the smallest case: one library alone."""
    worker = flows.Worker("mlp", "default", 1, only="robbench none")
    try:
        assert set(worker.about["memory"]) == {"robbench none"}
        assert worker.about["allocator"] == "default"
        assert worker.time("robbench none") > 0
    finally:
        worker.close()


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(UserError, match="unknown case 'smal'; did you mean 'small'"):
        flows.case_named("smal")


def test_absent_libraries_are_named_and_the_tables_are_written() -> None:
    def absent(_flow: nn.Module, _frozen: bool) -> nn.Module:
        raise ImportError("No module named 'lost'")

    bench = flows.prepare(tiny("glow", lost=absent))
    flows.deviations(bench)
    names = list(bench.decoders)
    assert names == ["robbench none", "robbench mask", "robbench invert"]
    assert "pip install lost" in bench.absent["lost"]
    times = {allocator: {name: [1.0, 2.0, 4.0] for name in names} for allocator in ("tuned", "default")}
    times["default"]["robbench mask"] = [3.0, 3.0, 4.0]
    about = {
        "memory": {"robbench none": 1000, "robbench mask": 290, "robbench invert": 30},
        "deviations": {},
        "absent": bench.absent,
    }
    result = flows._summary("small", 3, times, about)
    assert result["ratio"]["default"]["robbench mask"] == [1.25, 1.5, 2.25]
    report = {"command": "c", "cpu": "p", "threads": 1, "versions": {}, "cases": {"small": result}}
    text = markdown(report)
    assert "lost is missing" in text
    assert "| memory of `mask`, of `none` | 0.290 | 0.3 | met |" in text
    assert "| memory of `invert`, of `none` | 0.030 | 0.02 | missed by 50% |" in text


def _state() -> object:
    from robbench.core.allocator import AllocatorState

    return AllocatorState("default", "left alone by the test")
