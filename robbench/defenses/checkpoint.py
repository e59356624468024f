"""One file per epoch with all that training needs to go on, replaced atomically.

Its first line holds a name and version of the format and the sha256 of the rest, which is what torch.save writes.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from robbench.core.errors import UserError
from robbench.core.resources import write_atomically

MAGIC, DIGEST_LENGTH = b"robbench checkpoint 2 ", 64
ZIP = b"PK"  # torch.save's first bytes, and those of a checkpoint of before there was a digest
_AFRESH = "move it away to start afresh, or choose another --name or --out"
State = dict[str, Any]


@dataclass
class Progress:
    """Where a training stands after `epoch` whole epochs.

    best: state of the best epoch so far (score: higher is better; bits/dim are stored negated). seconds:
    computing time over all sittings. history: one record per epoch.
    """

    model: State
    optimizer: State
    epoch: int = 0
    best: State = field(default_factory=dict)
    best_epoch: int = 0
    best_score: float = float("-inf")
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def save(path: Path, identity: Mapping[str, Any], progress: Progress) -> None:
    """Replace the checkpoint at `path`. identity: plain values that say which training this is."""
    # Not dataclasses.asdict: it would copy every tensor.
    buffer = io.BytesIO()  # torch's own writer reports a full disk as an error of its own, not of the system
    torch.save({"identity": dict(identity), **vars(progress)}, buffer)
    payload = buffer.getbuffer()
    header = MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            stream.write(header)
            stream.write(payload)

    write_atomically(path, write)


def load(path: Path, identity: Mapping[str, Any], device: torch.device) -> Progress | None:
    """The progress stored at `path`, None when there is no file.

    `UserError` when any bit of the file is not what was written, or it belongs to another training: the message names
    what differs. Nothing is unpickled before the digest agrees.
    """
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_AFRESH}") from error
    content = _content(path, _payload(path, stored), device)
    changed = differences(content.pop("identity"), identity)
    if changed:
        raise UserError(
            f"{path} belongs to another training: {'; '.join(changed[:4])}"
            f"{f' (+{len(changed) - 4} more)' if len(changed) > 4 else ''}; "
            f"repeat its options to resume, move it away, or choose another --name or --out"
        )
    return Progress(**content)


def _payload(path: Path, stored: bytes) -> memoryview:
    """What torch.save wrote, of a file whose digest agrees."""
    if stored.startswith(ZIP):
        raise UserError(
            f"{path} has no digest (an earlier robbench wrote it, or another program), and nothing else would tell a "
            f"damaged one; {_AFRESH}"
        )
    start = len(MAGIC) + DIGEST_LENGTH + 1
    payload = memoryview(stored)[start:]
    header = MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    if not stored.startswith(MAGIC):
        raise UserError(f"{path} is damaged or not a checkpoint of this robbench train; {_AFRESH}")
    if stored[:start] != header:
        raise UserError(f"{path} is damaged: its content does not have the digest written with it; {_AFRESH}")
    return payload


def _content(path: Path, payload: memoryview, device: torch.device) -> State:
    try:
        content: State = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
        missing = {field.name for field in fields(Progress)} ^ (content.keys() - {"identity"})
        if missing or "identity" not in content:
            raise ValueError(f"other entries than a checkpoint has: {', '.join(sorted(missing))}")
    except Exception as error:  # another version of torch wrote it, or somebody who also wrote the digest
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is not a checkpoint that can be read here ({type(error).__name__}: {reason}); {_AFRESH}"
        ) from error
    return content


def differences(stored: Mapping[str, Any], requested: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Which entries differ, as "key was A, now B", nested keys with dots."""
    found = []
    for key in sorted({*stored, *requested}):
        old, new = stored.get(key), requested.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, now {new!r}")
    return found
