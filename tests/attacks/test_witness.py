"""Witnesses as bytes: nothing is lost, the same witness gives the same bytes, and nothing else is read as one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load as torch_load

from robbench.attacks.witness import BadWitnessError, Witness

floats = arrays(np.float32, array_shapes(max_dims=3, max_side=4), elements=st.floats(width=32))
perturbations = st.dictionaries(st.sampled_from(["lambda", "delta", "noise"]), floats, min_size=1)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)


@settings(max_examples=60)
@given(perturbations, hashes, st.integers(0, 10**6))
def test_round_trip(values: dict[str, np.ndarray], flow: str, condition: int) -> None:
    """Bit for bit, also NaN and -0.0; in whatever order the perturbations came."""
    content = Witness(flow, condition, values).to_bytes()
    again = Witness.from_bytes(content)
    assert (again.flow, again.condition, again.perturbations.keys()) == (flow, condition, values.keys())
    for name, value in values.items():
        assert again.perturbations[name].shape == value.shape
        assert again.perturbations[name].tobytes() == value.tobytes()
    assert Witness(flow, condition, dict(reversed(values.items()))).to_bytes() == content


def test_any_reader_of_safetensors_reads_it() -> None:
    shift = torch.randn(5, generator=torch.Generator().manual_seed(0))
    content = Witness("a" * 64, 3, {"lambda": shift.numpy()}).to_bytes()
    assert torch.equal(torch_load(content)["lambda"], shift)
    assert torch_load(content)["condition"].tolist() == [3]


@settings(max_examples=200)
@given(st.data())
def test_other_bytes(data: st.DataObject) -> None:
    good = Witness("a" * 64, 3, {"lambda": np.arange(4, dtype=np.float32)}).to_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    content = data.draw(st.sampled_from([good[:place], good + b"x", b"", b"\xff" * 40]))
    with pytest.raises(BadWitnessError, match="is no witness"):
        Witness.from_bytes(content)


@settings(max_examples=300)
@given(st.integers(0, 400), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_read_as_a_witness(place: int, change: int) -> None:
    good = Witness("a" * 64, 3, {"lambda": np.arange(4, dtype=np.float32)}).to_bytes()
    place %= len(good)
    content = good[:place] + bytes([good[place] ^ change]) + good[place + 1 :]
    try:
        read = Witness.from_bytes(content)
    except BadWitnessError:
        return
    assert read.to_bytes() != good


@pytest.mark.parametrize(
    "arrays_",
    [
        {"lambda": np.zeros(4)},
        {"lambda": np.zeros(4, np.float32), "condition": np.zeros(2, np.int64)},
        {"lambda": np.zeros(4, np.float32), "condition": np.zeros(1, np.float32)},
        {"condition": np.zeros(1, np.int64)},
    ],
)
def test_other_arrays(arrays_: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    with pytest.raises(BadWitnessError):
        Witness.from_bytes(save({"condition": np.zeros(1, np.int64), **arrays_}, {"flow": "a" * 64}))
