"""Downloads take no more than the file that is meant can have, and leave nothing when it is another one."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from robbench.core.download import BLOCK_BYTES, LimitedFile, TooLarge, download, wrong_digest
from robbench.core.errors import UserError
from robbench.models.checkpoints import most_weights_bytes

MOST = 190_000  # bytes of the file that is meant
ENDLESS = 64 << 20  # what the server sends where nobody stops it


class Counting(BaseHTTPRequestHandler):
    """Serves /announced with a length of 3 GB, /silent without a length, /lying with a short one, and counts bytes."""

    sent = 0

    def do_GET(self) -> None:
        type(self).sent = 0
        self.send_response(200)
        lengths = {"/announced": 3 << 30, "/lying": 10}
        if self.path in lengths:
            self.send_header("Content-Length", str(lengths[self.path]))
        self.end_headers()
        block = b"\0" * BLOCK_BYTES
        try:
            while type(self).sent < ENDLESS:
                self.wfile.write(block)
                type(self).sent += len(block)
        except OSError:
            return  # the client has left, as it should

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/announced", "has 3,221,225,472 bytes, and the file that is meant at most 190,000"),
        ("/silent", "is larger than expected: the file that is meant at most 190,000; stopped there"),
        ("/lying", "has sha256 "),  # HTTP ends a body after the announced bytes
    ],
)
def test_a_server_that_sends_more_is_left(address: str, path: str, reason: str, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model.pt"
    right = partial(wrong_digest, sha256="0" * 64)
    with pytest.raises(UserError) as caught:
        download((address + path,), target, right, "the model", MOST)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(target.parent.iterdir()) == []
    assert Counting.sent < ENDLESS


def test_a_file_without_an_end(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stopped there"):
        download(("file:///dev/zero",), tmp_path / "model.pt", lambda _: None, "the model", MOST)
    assert list(tmp_path.iterdir()) == []


def test_a_file_just_as_large_as_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * MOST)
    download(((tmp_path / "source").as_uri(),), tmp_path / "model.pt", lambda _: None, "the model", MOST)
    assert (tmp_path / "model.pt").stat().st_size == MOST


def test_whatever_writes_in_pieces_is_limited(tmp_path: Path) -> None:
    with LimitedFile(tmp_path / "file", 10) as stream:
        assert [stream.write(b"abc") for _ in range(3)] == [3, 3, 3]
        with pytest.raises(TooLarge):
            stream.write(b"abc")
    assert (tmp_path / "file").stat().st_size <= 10


@pytest.mark.parametrize(
    "module", [nn.Linear(100, 100), nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))]
)
def test_the_limit_of_a_card_is_above_its_checkpoints(module: nn.Module, tmp_path: Path) -> None:
    """A training checkpoint: float64 weights, an average of them and Adam's two moments."""
    optimizer = torch.optim.Adam(module.parameters())
    sum(p.sum() for p in module.parameters()).backward()
    optimizer.step()
    state = {name: value.double() for name, value in module.state_dict().items()}
    torch.save({"model": state, "average": state, "optimizer": optimizer.state_dict()}, tmp_path / "m.pt")
    size = (tmp_path / "m.pt").stat().st_size
    assert size < most_weights_bytes(module) < size + (24 << 20)


def test_a_module_that_does_not_know_its_sizes_yet() -> None:
    assert most_weights_bytes(nn.LazyLinear(10)) > 1 << 30
