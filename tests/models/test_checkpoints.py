"""Weights of other people's making: where they are looked for, what is refused, and that nothing loads half."""

import hashlib
import os
import pickle
import threading
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from robbench.cards import ModelCard, Weights
from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.core.schema import validate
from robbench.models.checkpoints import load_strictly
from robbench.models.classifiers import ARCHITECTURES, digits_cnn
from robbench.models.entry import ZooEntry
from robbench.models.loading import load_model
from robbench.models.zoo import read_entry, zoo_entries

SHAPE = (1, 8, 8)
SHIPPED = zoo_entries()["digits-at"]
PAGE = b"<!DOCTYPE html><html><body>Sign in to download</body></html>"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; its folder of checkpoints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBBENCH_CHECKPOINTS", raising=False)
    return tmp_path / "cache" / "robbench" / "checkpoints"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return digits_cnn(SHAPE, 10, width=2).eval()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_card(folder: Path, weights: dict[str, Any], **changes: Any) -> Path:
    """A card of the digits CNN in `folder`; returns its path."""
    card = {
        "name": "mine",
        "kind": "classifier",
        "description": "from elsewhere",
        "dataset": "digits",
        "defense": "standard",
        "architecture": {"name": "digits-cnn", "arguments": {"width": 2}},
        "input_shape": list(SHAPE),
        "classes": 10,
        "weights": weights,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(card))
    return path


def saved(folder: Path, content: object, **weights: Any) -> ZooEntry:
    """The entry of a card whose checkpoint torch.save wrote beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "model.pt")
    weights = {"file": "model.pt", "sha256": digest(folder / "model.pt"), "format": "state-dict", **weights}
    return read_entry(write_card(folder, weights))


def same_function(entry: ZooEntry, network: nn.Module) -> bool:
    x = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    return torch.equal(load_model(entry).module(x), network(x))


def refused(entry: ZooEntry, *parts: str) -> str:
    """The one-line message with which loading is refused; it has every one of `parts`."""
    with pytest.raises(UserError) as caught:
        load_model(entry)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("model 'mine'", *parts):
        assert part in message, message
    return message


# ------------------------------------------------------------------------------------------------ state dicts as found
def test_state_dict_as_torch_saves_it(tmp_path: Path, network: nn.Module) -> None:
    assert same_function(saved(tmp_path, network.state_dict()), network)


def test_state_dict_in_the_format_before_zip_files(tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    weights = {"file": "old.pt", "sha256": digest(tmp_path / "old.pt"), "format": "state-dict"}
    assert same_function(read_entry(write_card(tmp_path, weights)), network)


def test_data_parallel_prefix(tmp_path: Path, network: nn.Module) -> None:
    state = nn.DataParallel(network).state_dict()
    assert same_function(saved(tmp_path / "right", state, prefix="module."), network)
    refused(
        saved(tmp_path / "without", state), 'set `prefix: "module."` under weights', "missing", "unexpected"
    )
    refused(
        saved(tmp_path / "wrong", state, prefix="model."),
        "10 of its 10 tensors",
        "'model.'",
        "module.0.weight",
    )


def test_prefix_of_safetensors(tmp_path: Path, network: nn.Module) -> None:
    save_file(
        {f"net.{name}": value for name, value in network.state_dict().items()}, tmp_path / "m.safetensors"
    )
    weights = {"file": "m.safetensors", "sha256": digest(tmp_path / "m.safetensors"), "prefix": "net."}
    assert same_function(read_entry(write_card(tmp_path, weights)), network)


def test_a_prefix_is_never_dropped_from_some_names_only(tmp_path: Path, network: nn.Module) -> None:
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    state["normalizer.mean"] = torch.zeros(1)
    refused(saved(tmp_path, state, prefix="model."), "1 of its 11 tensors", "normalizer.mean")


def test_nested_checkpoints_and_suggested_keys(tmp_path: Path, network: nn.Module) -> None:
    state = network.state_dict()
    nested = {"epoch": 3, "net": {"state_dict": state, "lr": 0.1}, "optimizer": {"step": [1, 2]}}
    assert same_function(saved(tmp_path / "a", nested, key="net.state_dict"), network)
    message = refused(
        saved(tmp_path / "b", nested), "set `key: net.state_dict` under weights", "epoch, net, optimizer"
    )
    assert "optimizer.step" not in message
    refused(saved(tmp_path / "c", nested, key="net"), "under key 'net'", "set `key: net.state_dict`")
    assert same_function(saved(tmp_path / "d", {"a.b": state}, key="a.b"), network)
    refused(saved(tmp_path / "e", state, key="state_dict"), "a state dict itself: remove key")
    refused(saved(tmp_path / "f", [1, 2]), "it is a list")
    refused(saved(tmp_path / "g", {"epoch": 3}), "a dict of epoch", "torch.save a state_dict()")
    refused(saved(tmp_path / "h", {}), "10 missing")
    flat = {**state, "epoch": 3, "best": 0.9}
    refused(saved(tmp_path / "i", flat), "2 of its 12 entries are no tensors (epoch, best)")


def test_key_and_prefix_together_as_lightning_writes_them(tmp_path: Path, network: nn.Module) -> None:
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    assert same_function(saved(tmp_path, {"state_dict": state}, key="state_dict", prefix="model."), network)


def test_missing_and_unexpected_tensors_are_counted_and_named(tmp_path: Path, network: nn.Module) -> None:
    state = {name.replace("0.weight", "first"): value for name, value in network.state_dict().items()}
    state |= {f"head.{letter}": torch.zeros(1) for letter in "abcde"}
    message = refused(saved(tmp_path, state), "1 missing (0.weight)", "6 unexpected (", "of 10 tensors")
    assert message.count("head.") == 2  # three names in all
    assert "correct the card's architecture" in message


def test_other_shapes_do_not_fit(tmp_path: Path) -> None:
    refused(
        saved(tmp_path, digits_cnn(SHAPE, 10, width=3).state_dict()),
        "do not fit",
        "digits-cnn",
        "size mismatch",
    )


@settings(max_examples=30)
@given(st.lists(st.from_regex(r"[a-z]{1,4}", fullmatch=True), min_size=1, max_size=3))
def test_the_suggested_prefix_is_the_one_that_loads(parts: list[str]) -> None:
    prefix = "".join(f"{part}." for part in parts)
    layer = nn.Sequential(nn.Linear(2, 2))
    state = {prefix + name: value for name, value in layer.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_strictly(layer, state, SHIPPED)
    assert f'set `prefix: "{prefix}"` under weights' in str(caught.value)


def test_a_prefix_the_architecture_has_and_the_file_lacks() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    state = {name.removeprefix("0."): value for name, value in layer.state_dict().items()}
    with pytest.raises(UserError, match=r"names begin with '0\.' and the file's do not"):
        load_strictly(layer, state, SHIPPED)


def test_batch_norm_of_files_older_than_its_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from before PyTorch 0.4.1 have no num_batches_tracked; PyTorch itself fills it in, strictly."""

    def build(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes))

    monkeypatch.setitem(ARCHITECTURES._entries, "bn", build)
    state = {
        f"module.{name}": value
        for name, value in build(SHAPE, 10).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    for prefix in ("module.", ""):
        entry = saved(tmp_path / f"p{prefix}", state, prefix=prefix)
        card = yaml.safe_load((entry.folder / "card.yaml").read_text())
        write_card(entry.folder, card["weights"], architecture={"name": "bn"})
        if prefix:
            load_model(read_entry(entry.folder))
        else:
            refused(read_entry(entry.folder), 'set `prefix: "module."`')


# ----------------------------------------------------------------------------------------------------- what is refused
class Touch:
    """A pickle of this runs code when it is loaded the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path, network: nn.Module) -> None:
    state = {**network.state_dict(), "extra": Touch(tmp_path / "ran")}
    refused(saved(tmp_path / "a", state), "more than tensors", "mkdir", "can run code and is refused")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "a" / "model.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap does work


def test_whole_modules_and_options_are_refused(tmp_path: Path, network: nn.Module) -> None:
    refused(saved(tmp_path / "a", network), "more than tensors", "Sequential", "torch.save its state_dict()")
    refused(
        saved(tmp_path / "b", {"state_dict": network.state_dict(), "args": Namespace(lr=1)}),
        "argparse.Namespace",
    )


def test_files_that_are_no_checkpoints(tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no weights here"}.items():
        (tmp_path / name).mkdir()
        path = tmp_path / name / "model.pt"
        path.write_bytes(content)
        weights = {"file": path.name, "sha256": digest(path), "format": "state-dict"}
        refused(
            read_entry(write_card(path.parent, weights)),
            str(path),
            "is not a checkpoint that torch.save wrote",
        )
        weights["sha256"] = digest(tmp_path / "whole.pt")
        refused(
            read_entry(write_card(path.parent, weights)),
            f"{path} has sha256 {digest(path)[:12]}..., not {weights['sha256'][:12]}...",
        )


def test_a_pickle_that_torch_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"weight": [1.0]}, protocol=4))
    weights = {"file": "model.pt", "sha256": digest(tmp_path / "model.pt"), "format": "state-dict"}
    message = refused(
        read_entry(write_card(tmp_path, weights)), "is not a checkpoint that torch.save wrote ("
    )
    assert "weights_only" not in message  # not PyTorch's advice to run its code


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.to(torch.complex64),
        lambda weight: (weight * 100).int(),
        lambda weight: weight.to_sparse(),
        lambda weight: weight.to("meta"),
    ],
    ids=["complex", "integer", "sparse", "meta"],
)
def test_tensors_that_would_be_converted_with_a_loss(change: Any, tmp_path: Path, network: nn.Module) -> None:
    state = network.state_dict()
    entry = saved(tmp_path, {**state, "0.weight": change(state["0.weight"])})
    refused(entry, "do not fit architecture 'digits-cnn'", "(0.weight)", "save its dense, real weights")


def test_integers_may_fill_buffers_and_narrower_floats_weights() -> None:
    """Masks are published as integers, float16 files are exact in float32."""
    module = nn.BatchNorm1d(2)
    state = {"running_mean": torch.tensor([1, 0]), "running_var": torch.ones(2, dtype=torch.float64)}
    state |= {"weight": torch.ones(2).half(), "bias": torch.ones(2).bfloat16()}
    state |= {"num_batches_tracked": torch.tensor(3)}
    load_strictly(module, state, SHIPPED)
    assert module.state_dict()["running_mean"].tolist() == [1.0, 0.0]


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, but such files are around
def test_torchscript_is_refused(tmp_path: Path, network: nn.Module) -> None:
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, *SHAPE)), tmp_path / "model.pt")
    weights = {"file": "model.pt", "sha256": digest(tmp_path / "model.pt"), "format": "state-dict"}
    refused(read_entry(write_card(tmp_path, weights)), "TorchScript")


def test_a_web_page_beside_the_card(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"\n  " + PAGE)
    entry = read_entry(write_card(tmp_path, {"file": "model.pt", "sha256": "0" * 64, "format": "state-dict"}))
    refused(entry, "is an HTML page, not weights", "delete it")


def test_a_pickle_needs_its_format_named(tmp_path: Path, network: nn.Module) -> None:
    refused(saved(tmp_path, network.state_dict(), format="safetensors"), "`format: state-dict`")


# --------------------------------------------------------------------------------------------------------------- cards
@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ({"format": "pickle"}, "safetensors"),
        ({"key": "state_dict"}, "a safetensors file has no entries"),
        ({"urls": ["ftp://host/model.pt"]}, "urls"),
        ({"urls": "https://host/model.pt"}, "urls"),
        ({"urls": ["https://host/m.pt"], "file": "../m.pt"}, "relative path"),
        ({"urls": ["https://host/m.pt"], "file": "/m.pt"}, "relative path"),
        ({"sha256": "abc"}, "sha256"),
        ({"file": ""}, "file"),
        ({"file": "a\0b.pt"}, "file"),
    ],
)
def test_malformed_weights_of_a_card(weights: dict[str, Any], part: str, tmp_path: Path) -> None:
    card = write_card(tmp_path, {"file": "m.safetensors", "sha256": "0" * 64, **weights})
    with pytest.raises(UserError) as caught:
        read_entry(card)
    assert str(card) in str(caught.value)
    assert "key weights" in str(caught.value)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"preprocessing": {"mean": [0.1], "std": [0.0]}}, "std"),
        ({"preprocessing": {"mean": [0.1, 0.2], "std": [1.0]}}, "mean has 2 values, std 1"),
        ({"preprocessing": {"mean": [0.1] * 3, "std": [1.0] * 3}}, "3 means, images have 1 channels"),
        ({"preprocessing": {"mean": [0.1], "std": [1.0]}, "kind": "flow"}, "would change a flow's density"),
        ({"preprocessing": {"mean": [float("nan")], "std": [1.0]}}, "mean"),
    ],
)
def test_malformed_preprocessing(changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    card = write_card(tmp_path, {"file": "m.safetensors", "sha256": "0" * 64}, **changes)
    with pytest.raises(UserError, match="preprocessing") as caught:
        read_entry(card)
    assert part in str(caught.value)


def test_preprocessing_is_part_of_the_function(tmp_path: Path, network: nn.Module) -> None:
    plain = saved(tmp_path, network.state_dict())
    normalised = read_entry(
        write_card(
            tmp_path, plain.card.weights.model_dump(mode="json"), preprocessing={"mean": [0.25], "std": [0.5]}
        )
    )
    x = torch.rand(4, *SHAPE)
    torch.testing.assert_close(load_model(normalised).module(x), network((x - 0.25) / 0.5))
    assert normalised.card.function_hash != plain.card.function_hash


def test_function_hashes_of_earlier_cards_are_what_they_were() -> None:
    """Ledgers are addressed by them: a key that a card leaves out must not count."""
    assert SHIPPED.card.function_hash == ("22ccce45c2a2b957147416c63e746960aca6f5f61e58e09a0c2d6ea94f874d2f")


def test_what_the_function_hash_depends_on(tmp_path: Path) -> None:
    def hashed(**weights: Any) -> str:
        full = {"file": "m.pt", "sha256": "0" * 64, "format": "state-dict", **weights}
        return read_entry(write_card(tmp_path, full)).card.function_hash

    plain = hashed()
    assert hashed(urls=["https://host/m.pt"]) == hashed(file="other.pt") == plain
    assert len({plain, hashed(key="a"), hashed(prefix="a"), hashed(key="b"), hashed(sha256="1" * 64)}) == 5


def test_cards_without_the_new_keys_mean_what_they_did() -> None:
    weights = Weights(file="w.safetensors", sha256="0" * 64)
    assert (weights.urls, weights.format, weights.key, weights.prefix) == ((), "safetensors", None, "")
    with pytest.raises(ValidationError):
        Weights(file="w.safetensors", sha256="0" * 64, mirror="x")  # type: ignore[call-arg]
    assert validate(SHIPPED.card.model_dump(mode="json"), ModelCard, "again").preprocessing is None


# ------------------------------------------------------------------------------------------------------ where it lies
def test_where_weights_are_looked_for(
    tmp_path: Path, cache: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the card, in --checkpoints, in ROBBENCH_CHECKPOINTS without it, in the cache; the first that has it."""
    places = [tmp_path / "zoo" / "mine", tmp_path / "named", tmp_path / "environment", cache]
    card = None
    for place in places:
        (place / "sub").mkdir(parents=True)
        torch.save(network.state_dict(), place / "sub" / "m.pt")
        card = card or write_card(
            places[0],
            {"file": "sub/m.pt", "sha256": digest(place / "sub" / "m.pt"), "format": "state-dict"},
        )
    assert card is not None
    from robbench.models.zoo import present_weights

    def found(named: Path | None = None) -> Path | None:
        return present_weights(read_entry(card, named))

    monkeypatch.setenv("ROBBENCH_CHECKPOINTS", str(places[2]))
    assert found(places[1]) == places[0] / "sub" / "m.pt"
    (places[0] / "sub" / "m.pt").unlink()
    assert found(places[1]) == places[1] / "sub" / "m.pt"
    assert found() == places[2] / "sub" / "m.pt"
    assert same_function(read_entry(card), network)
    monkeypatch.delenv("ROBBENCH_CHECKPOINTS")
    assert found() == cache / "sub" / "m.pt"
    (cache / "sub" / "m.pt").unlink()
    assert found() is None
    refused(read_entry(card), "sub/m.pt is missing", "--checkpoints")
    monkeypatch.setenv("ROBBENCH_CHECKPOINTS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"ROBBENCH_CHECKPOINTS .*nowhere.* is not a folder"):
        load_model(read_entry(card))


def test_missing_weights_say_where_they_come_from(tmp_path: Path) -> None:
    weights = {"file": "m.pt", "sha256": "0" * 64, "format": "state-dict"}
    refused(
        read_entry(write_card(tmp_path, weights, source="https://example.org/zoo")), "https://example.org/zoo"
    )


# ------------------------------------------------------------------------------------------------------------ download
class Server:
    """A web server on this machine. files: status, body and announced length by path; asked: paths, in order."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, bytes, int]] = {}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                status, body, length = server.files.get(self.path, (404, b"gone", 4))
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}{path}"

    def serve(self, path: str, body: bytes, status: int = 200, length: int | None = None) -> str:
        self.files[path] = (status, body, len(body) if length is None else length)
        return self.url(path)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def content(tmp_path: Path, network: nn.Module) -> bytes:
    torch.save(network.state_dict(), tmp_path / "content.pt")
    return (tmp_path / "content.pt").read_bytes()


def downloadable(folder: Path, content: bytes, *urls: str) -> ZooEntry:
    sha256 = hashlib.sha256(content).hexdigest()
    weights = {"file": "there/m.pt", "sha256": sha256, "urls": list(urls), "format": "state-dict"}
    return read_entry(write_card(folder / "card", weights))


def test_download_once(
    tmp_path: Path,
    cache: Path,
    server: Server,
    content: bytes,
    network: nn.Module,
    capfd: pytest.CaptureFixture[str],
) -> None:
    entry = downloadable(tmp_path, content, server.serve("/m.pt", content))
    assert same_function(entry, network)
    assert (cache / "there" / "m.pt").read_bytes() == content
    assert same_function(entry, network)
    assert server.asked == ["/m.pt"]
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"downloading {server.url('/m.pt')} (0." in err


def test_mirrors_are_tried_in_order(
    tmp_path: Path, cache: Path, server: Server, content: bytes, network: nn.Module
) -> None:
    urls = [
        server.url("/gone.pt"),
        server.serve("/page", PAGE),
        server.serve("/m.pt", content),
        server.url("/no"),
    ]
    assert same_function(downloadable(tmp_path, content, *urls), network)
    assert server.asked == ["/gone.pt", "/page", "/m.pt"]
    assert [path.name for path in (cache / "there").iterdir()] == ["m.pt"]


def test_every_failure_is_listed_and_nothing_is_left(
    tmp_path: Path, cache: Path, server: Server, content: bytes
) -> None:
    urls = [
        server.serve("/gone.pt", b"", status=404),
        server.serve("/page", PAGE),
        server.serve("/short.pt", content[:1000], length=len(content)),
        server.serve("/other.pt", content[:-1] + b"x"),
        "http://127.0.0.1:9/closed.pt",
        (tmp_path / "absent.pt").as_uri(),
        server.serve("/broken.pt", b"", status=503),
    ]
    message = refused(
        downloadable(tmp_path, content, *urls),
        f"{urls[0]}: the server says 404",
        f"{urls[1]}: is an HTML page, not weights",
        f"{urls[2]}: the connection broke off after 1,000 of {len(content):,} bytes",
        f"{urls[3]}: has sha256 ",
        f"{urls[4]}: no connection (",
        f"{urls[5]}: no connection (",
        f"{urls[6]}: the server says 503",
        f"put it at {cache / 'there' / 'm.pt'}",
        "--checkpoints",
    )
    assert len(message) < 1500
    assert list((cache / "there").iterdir()) == []


def test_a_file_url_is_a_mirror_too(tmp_path: Path, content: bytes, network: nn.Module) -> None:
    assert same_function(downloadable(tmp_path, content, (tmp_path / "content.pt").as_uri()), network)


def test_a_changed_file_in_the_cache_is_named(
    tmp_path: Path, cache: Path, server: Server, content: bytes
) -> None:
    (cache / "there").mkdir(parents=True)
    (cache / "there" / "m.pt").write_bytes(PAGE)
    entry = downloadable(tmp_path, content, server.serve("/m.pt", content))
    refused(entry, str(cache / "there" / "m.pt"), "HTML page", "delete it")
    (cache / "there" / "m.pt").write_bytes(content[1:])
    refused(entry, str(cache / "there" / "m.pt"), "has sha256", "delete it", "call yours mine/m.pt")
    assert server.asked == []


# -------------------------------------------------------------------------------------------------------- command line
def robbench(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_run_with_checkpoints(tmp_path: Path, network: nn.Module) -> None:
    held = tmp_path / "held"
    held.mkdir()
    torch.save({"net": nn.DataParallel(network).state_dict()}, held / "m.pt")
    weights = {
        "file": "m.pt",
        "sha256": digest(held / "m.pt"),
        "format": "state-dict",
        "key": "net",
        "prefix": "module.",
    }
    card = write_card(tmp_path / "mine", weights, preprocessing={"mean": [0.5], "std": [0.5]})
    run = ("run", "--attacks", "fgsm", "--n", 6, "--out", tmp_path / "out", "--model", card)
    code, _, error = robbench(*run)
    assert (code, error.count("\n")) == (2, 1)
    assert "m.pt is missing" in error
    assert not (tmp_path / "out").exists()
    code, out, error = robbench(*run, "--checkpoints", held)
    assert (code, error) == (0, "")
    assert "mine" in out
    stored = yaml.safe_load((tmp_path / "out" / "cards" / "mine.yaml").read_text())
    assert stored["weights"]["prefix"] == "module."
    assert stored["preprocessing"] == {"mean": [0.5], "std": [0.5]}
    code, _, error = robbench(*run, "--checkpoints", tmp_path / "nowhere")
    assert code == 2
    assert "--checkpoints" in error
    assert "is not a folder" in error


def test_show_says_where_the_weights_are(tmp_path: Path, network: nn.Module) -> None:
    entry = saved(tmp_path / "zoo" / "mine", network.state_dict())
    path = entry.folder / "model.pt"
    code, out, _ = robbench("show", "mine", "--zoo", tmp_path / "zoo")
    assert code == 0
    assert f"# weights: {path}\n" in out
    held = tmp_path / "held"
    held.mkdir()
    path.rename(held / "model.pt")
    assert "not on this machine" in robbench("show", "mine", "--zoo", tmp_path / "zoo")[1]
    out = robbench("show", "mine", "--zoo", tmp_path / "zoo", "--checkpoints", held)[1]
    assert f"# weights: {held / 'model.pt'}\n" in out


def test_doctor_downloads_nothing(tmp_path: Path, server: Server, content: bytes) -> None:
    from robbench.cli.doctor import _model

    absent = _model("mine", downloadable(tmp_path, content, server.serve("/m.pt", content)))
    assert absent.state == "missing"
    assert "downloaded at first use" in absent.details
    assert server.asked == []
    without = saved(tmp_path / "b", {"epoch": 1})
    assert _model("mine", without).state == "broken"
