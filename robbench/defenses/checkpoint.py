"""One file an epoch with all that training needs to go on, replaced atomically."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from robbench.errors import UserError
from robbench.resources import write_atomically

SCHEMA_VERSION = 1
State = dict[str, Any]


@dataclass
class Progress:
    """Where a training stands after `epoch` whole epochs.

    best: state of the best epoch so far (score: higher is better; bits/dim are stored negated). seconds:
    computing time over all sittings. history: one record an epoch.
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
    content = {"schema_version": SCHEMA_VERSION, "identity": dict(identity), **vars(progress)}
    buffer = io.BytesIO()  # torch's own writer reports a full disk as an error of its own, not of the system
    torch.save(content, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load(path: Path, identity: Mapping[str, Any], device: torch.device) -> Progress | None:
    """The progress stored at `path`, None when there is no file.

    `UserError` when the file is damaged, or belongs to another training: the message names what differs.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        stored, version = content.pop("identity"), content.pop("schema_version")
        progress = Progress(**content)
    except Exception as error:  # a foreign or half-written file can make the unpickler raise anything
        raise UserError(
            f"{path} is damaged or not a checkpoint of robbench train ({type(error).__name__}); "
            f"move it away to start afresh, or choose another --name or --out"
        ) from error
    changed = differences(stored, identity) if version == SCHEMA_VERSION else ["checkpoint format"]
    if changed:
        raise UserError(
            f"{path} belongs to another training: {'; '.join(changed[:4])}"
            f"{f' (+{len(changed) - 4} more)' if len(changed) > 4 else ''}; "
            f"repeat its options to resume, move it away, or choose another --name or --out"
        )
    return progress


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Which entries differ, as "key was A, now B", nested keys with dots."""
    found = []
    for key in sorted({*stored, *wanted}):
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, now {new!r}")
    return found
