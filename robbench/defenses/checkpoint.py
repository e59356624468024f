"""One file with everything that a training needs to resume, replaced atomically after every epoch.

Its first line has name and version of the format and the sha256 of the rest, which torch.save writes.
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
ZIP = b"PK"  # first bytes of torch.save's format, and of checkpoints without a digest
_AFRESH = "move it away to start afresh, or choose another --name or --out"
State = dict[str, Any]


@dataclass
class Progress:
    """State of a training after `epoch` epochs.

    Attributes:
        model: its state.
        optimizer: that of the optimisation: optimisers, and networks that are trained beside the model.
        epoch: number of finished epochs.
        best: model state of the best epoch so far.
        best_epoch: its number.
        best_score: its score; higher is better, bits/dim are negated.
        seconds: computing time over all sessions.
        history: one record per epoch.
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
    """Replace the checkpoint at `path`. identity: plain values that identify the training."""
    # Not dataclasses.asdict: it would copy every tensor.
    buffer = io.BytesIO()  # torch's own writer does not report a full disk as an OSError
    torch.save({"identity": dict(identity), **vars(progress)}, buffer)
    payload = buffer.getbuffer()
    header = MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            stream.write(header)
            stream.write(payload)

    write_atomically(path, write)


def load(path: Path, identity: Mapping[str, Any], device: torch.device) -> Progress | None:
    """The progress stored at `path`, None without a file.

    `UserError` when the file is damaged or belongs to another training, with the differences. Nothing is unpickled
    before the digest is verified.
    """
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_AFRESH}") from error
    content = _read_content(path, _payload(path, stored), device)
    changed = differences(content.pop("identity"), identity)
    if changed:
        raise UserError(
            f"{path} belongs to another training: {'; '.join(changed[:4])}"
            f"{f' (+{len(changed) - 4} more)' if len(changed) > 4 else ''}; "
            f"repeat its options to resume, move it away, or choose another --name or --out"
        )
    return Progress(**content)


def _payload(path: Path, stored: bytes) -> memoryview:
    """The output of torch.save in a checkpoint; `UserError` unless its digest is right."""
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


def _read_content(path: Path, payload: memoryview, device: torch.device) -> State:
    try:
        content: State = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
        missing = {field.name for field in fields(Progress)} ^ (content.keys() - {"identity"})
        if missing or "identity" not in content:
            raise ValueError(f"other entries than a checkpoint has: {', '.join(sorted(missing))}")
    except Exception as error:  # another version of torch wrote it, or it was forged with its digest
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is not a checkpoint that can be read here ({type(error).__name__}: {reason}); {_AFRESH}"
        ) from error
    return content


def differences(stored: Mapping[str, Any], requested: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Differing entries as "key was A, now B", nested keys with dots."""
    found = []
    for key in sorted({*stored, *requested}):
        old, new = stored.get(key), requested.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, now {new!r}")
    return found
