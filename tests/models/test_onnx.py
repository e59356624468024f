"""ONNX files as models: the same function and gradient as the PyTorch network and onnxruntime; what is refused."""

import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from robbench import RobbenchWarning, evaluate
from robbench.core.errors import UserError
from robbench.core.random import SampleRandom
from robbench.models.entry import ModelRequest
from robbench.models.loading import load_model
from robbench.models.sources import named_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    onnx = pytest.importorskip("onnx", reason="pip install 'robbench[onnx]'")
    onnx2torch = pytest.importorskip("onnx2torch", reason="pip install 'robbench[onnx]'")
from onnx import TensorProto, helper, numpy_helper

from robbench.models.libraries.onnx import OneByOne

DIGITS = ModelRequest("digits", (1, 8, 8), 10)


def write(path, nodes, arrays, inputs=None, outputs=None, opset=17, **save):
    """An ONNX file with initializers `arrays`; by default x [N,1,8,8] -> y [N,10]."""
    inputs = inputs or [("x", ["N", 1, 8, 8])]
    outputs = outputs or [("y", ["N", 10])]

    def values(listed):
        return [
            helper.make_tensor_value_info(one[0], one[2] if one[2:] else TensorProto.FLOAT, one[1])
            for one in listed
        ]

    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(
        [helper.make_node(*n[:3], **n[3]) for n in nodes], "g", values(inputs), values(outputs), tensors
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, str(path), **save)
    return path


def network(seed=0):
    """Convolution, ReLU and a linear layer, as a PyTorch module."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)).eval()


def arrays_of(module):
    convolution, linear = module[0], module[3]
    named = {"K": convolution.weight, "k": convolution.bias, "W": linear.weight, "b": linear.bias}
    return {name: value.detach().numpy() for name, value in named.items()}


CONVOLUTION = [("Conv", ["x", "K", "k"], ["c"], {"strides": [2, 2]}), ("Relu", ["c"], ["r"], {})]
LINEAR = ("Gemm", ["f", "W", "b"], ["y"], {"transB": 1})
FLATTEN = ("Flatten", ["r"], ["f"], {})


def reshape(rows):
    """Flattening as exporters write it, with the number of rows in a constant."""
    return ("Reshape", ["r", "s"], ["f"], {}), {"s": np.array([rows, -1], np.int64)}


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "net.onnx", [*CONVOLUTION, FLATTEN, LINEAR], arrays_of(network()))


def load(path, requested=DIGITS):
    return load_model(named_model(f"onnx:{path}", requested)).module


def refusal(path, requested=DIGITS):
    with pytest.raises(UserError) as caught:
        load(path, requested)
    message = str(caught.value)
    assert "\n" not in message
    return message


def images(n, shape=(1, 8, 8)):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


def gradient(module, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x).logsumexp(1).sum(), x)[0]


def test_same_outputs_and_gradients_as_the_network_it_was_written_from(file):
    entry = named_model(f"onnx:{file}", DIGITS)
    assert (entry.card.name, entry.card.input_shape, entry.card.classes) == ("onnx-net", (1, 8, 8), 10)
    module, x = load_model(entry).module, images(7)
    torch.testing.assert_close(module(x), network()(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(module, x), gradient(network(), x), rtol=1e-4, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_same_outputs_as_onnxruntime(file):
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    x = images(16)
    expected = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(load(file)(x), expected, rtol=1e-5, atol=1e-5)


def test_sizes_that_the_file_leaves_open_come_from_the_data_set(tmp_path):
    nodes = [*CONVOLUTION, FLATTEN, LINEAR]
    path = write(
        tmp_path / "open.onnx",
        nodes,
        arrays_of(network()),
        [("x", ["N", "C", "H", "W"])],
        [("y", ["N", "K"])],
    )
    card = named_model(f"onnx:{path}", DIGITS).card
    assert (card.input_shape, card.classes) == ((1, 8, 8), 10)
    message = refusal(path, ModelRequest("digits"))
    assert "[?,?,?,?] is open" in message


def test_it_can_be_sent_to_another_process(file, tmp_path):
    torch.save(load(file), tmp_path / "module.pt")
    module = torch.load(tmp_path / "module.pt", weights_only=False)
    torch.testing.assert_close(module(images(3)), network()(images(3)), rtol=1e-5, atol=1e-6)


def test_found_below_the_folder_of_checkpoints(file):
    entry = named_model("onnx:net.onnx", replace(DIGITS, checkpoints=file.parent))
    assert entry.folder == file.parent
    assert "is no file" in refusal("net.onnx")


# ---------------------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize(("node", "constant", "one_by_one"), [(*reshape(1), True), (FLATTEN, {}, False)])
def test_a_fixed_batch_of_one_takes_any_batch(tmp_path, node, constant, one_by_one):
    fixed = [("x", [1, 1, 8, 8])], [("y", [1, 10])]
    path = write(tmp_path / "one.onnx", [*CONVOLUTION, node, LINEAR], arrays_of(network()) | constant, *fixed)
    module, x = load(path), images(5)
    assert isinstance(module, OneByOne) == one_by_one
    torch.testing.assert_close(module(x), network()(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(module, x), gradient(network(), x), rtol=1e-4, atol=1e-7)


def test_another_fixed_batch_is_refused_where_the_graph_relies_on_it(tmp_path):
    node, constant = reshape(4)
    fixed = [("x", [4, 1, 8, 8])], [("y", [4, 10])]
    path = write(
        tmp_path / "four.onnx", [*CONVOLUTION, node, LINEAR], arrays_of(network()) | constant, *fixed
    )
    message = refusal(path)
    assert "batches of exactly 4 images" in message
    assert "dynamic batch" in message


def test_outputs_that_depend_on_the_other_images_are_refused(tmp_path):
    mean = ("ReduceMean", ["z"], ["m"], {"axes": [0], "keepdims": 1})
    nodes = [
        *CONVOLUTION,
        FLATTEN,
        ("Gemm", ["f", "W", "b"], ["z"], {"transB": 1}),
        mean,
        ("Sub", ["z", "m"], ["y"], {}),
    ]
    message = refusal(write(tmp_path / "batch.onnx", nodes, arrays_of(network())))
    assert "with the images beside it" in message
    assert "evaluation mode" in message


# ------------------------------------------------------------------------------------------------- newer operators
def test_what_todays_exporters_write_is_put_into_older_words(tmp_path):
    """Opset 20: axes as an input, allowzero, Gelu, weights behind Identity and in Constant nodes."""
    arrays = arrays_of(network()) | {"axes": np.array([2, 3]), "to": np.array([-1, 4])}
    arrays["W"], held = arrays["W"][:, :4].copy(), numpy_helper.from_array(arrays.pop("K"), "")
    nodes = [
        ("Constant", [], ["K0"], {"value": held}),
        ("Identity", ["K0"], ["K"], {}),
        ("Conv", ["x", "K", "k"], ["c"], {"strides": [2, 2]}),
        ("Gelu", ["c"], ["r"], {"approximate": "none"}),
        ("ReduceMean", ["r", "axes"], ["m"], {"keepdims": 1, "noop_with_empty_axes": 0}),
        ("Reshape", ["m", "to"], ["f"], {"allowzero": 1}),
        LINEAR,
    ]
    module, x = load(write(tmp_path / "new.onnx", nodes, arrays, opset=20)), images(5)

    def expected(x):
        own = network()
        return own[3].weight[:, :4] @ gelu(own[0](x)).mean((2, 3)).T + own[3].bias[:, None]

    torch.testing.assert_close(module(x), expected(x).T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient(module, x), gradient(lambda x: expected(x).T, x), rtol=1e-4, atol=1e-7
    )


class Residual(nn.Module):
    """A block whose equal batch norms an exporter writes as Identity nodes, global pooling and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.other = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    def forward(self, x):
        x = self.stem(x)
        return self.last(torch.relu(x + self.other(self.block(x))))


@pytest.mark.parametrize("options", [{}, {"opset_version": 17, "dynamo": False}])
def test_a_residual_network_as_torch_exports_it(tmp_path, options):
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        source = Residual().eval()
        torch.onnx.export(source, (torch.rand(1, 3, 8, 8),), tmp_path / "r.onnx", verbose=False, **options)
    module, x = load(tmp_path / "r.onnx", ModelRequest("colours", (3, 8, 8), 10)), images(3, (3, 8, 8))
    torch.testing.assert_close(module(x), source(x), rtol=1e-4, atol=1e-5)


def test_wrong_logits_of_a_conversion_are_refused_with_their_distance(file, monkeypatch):
    convert = onnx2torch.convert
    monkeypatch.setattr(onnx2torch, "convert", lambda proto: nn.Sequential(convert(proto), nn.ReLU()))
    message = refusal(file)
    with torch.no_grad():
        lowest = float(network()(0.5 + 0.5 * SampleRandom(0, "onnx").uniform([0], (1, 8, 8))).min())
    assert f"its logits are off by {-lowest:.3g}" in message


# --------------------------------------------------------------------------------------------------------- gradients
class Halved(nn.Module):
    """The wrapped network's function with half of its gradient."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(0.5 * x + 0.5 * x.detach())


def test_a_wrong_gradient_is_refused_with_its_numbers(file, monkeypatch):
    convert = onnx2torch.convert
    monkeypatch.setattr(onnx2torch, "convert", lambda proto: Halved(convert(proto)))
    message = refusal(file)
    assert "gradient is wrong at" in message
    numbers = [
        float(word)
        for word in message.replace(",", " ").split()
        if word.replace("-", "").replace(".", "").isdigit()
    ]
    by_autograd, by_differences = numbers[-2:]
    assert by_differences == pytest.approx(2 * by_autograd, rel=1e-3)


def test_a_cast_in_the_graph_is_checked_in_float32(tmp_path, monkeypatch):
    cast = ("Cast", ["r"], ["q"], {"to": TensorProto.FLOAT})
    nodes = [*CONVOLUTION, cast, ("Flatten", ["q"], ["f"], {}), LINEAR]
    path = write(tmp_path / "cast.onnx", nodes, arrays_of(network()))
    torch.testing.assert_close(load(path)(images(3)), network()(images(3)), rtol=1e-5, atol=1e-6)
    convert = onnx2torch.convert
    monkeypatch.setattr(onnx2torch, "convert", lambda proto: Halved(convert(proto)))
    assert "gradient is wrong at" in refusal(path)


@pytest.mark.parametrize(
    ("width", "kind", "reason"),
    [("K", TensorProto.INT64, "INT64, not float32"), (1, TensorProto.FLOAT, "one value an image")],
)
def test_labels_instead_of_logits_are_refused(tmp_path, width, kind, reason):
    raw = ("Gemm", ["f", "W", "b"], ["z"], {"transB": 1})
    last = ("ArgMax" if kind == TensorProto.INT64 else "ReduceMax", ["z"], ["y"], {})
    last[3].update({"axis": 1} if kind == TensorProto.INT64 else {"axes": [1]})
    nodes = [*CONVOLUTION, FLATTEN, raw, last]
    path = write(tmp_path / "labels.onnx", nodes, arrays_of(network()), outputs=[("y", ["N", width], kind)])
    assert reason in refusal(path)


def test_probabilities_are_reported_by_the_evaluation(tmp_path):
    nodes = [
        *CONVOLUTION,
        FLATTEN,
        ("Gemm", ["f", "W", "b"], ["z"], {"transB": 1}),
        ("Softmax", ["z"], ["y"], {"axis": 1}),
    ]
    module, x = load(write(tmp_path / "soft.onnx", nodes, arrays_of(network()))), images(4)
    with pytest.warns(RobbenchWarning, match="returns probabilities, not logits"):
        evaluate(module, x, module(x).argmax(1), attacks=("pgd20",), epsilon=0.01)


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("node", "opset", "named"),
    [
        (("Det", ["x"], ["y"], {}), 17, "operator Det of opset 17"),
        (("Magic", ["x"], ["y"], {"domain": "acme"}), 17, "operator acme::Magic"),
        (("Gelu", ["x"], ["y"], {"approximate": "tanh"}), 20, "operator Gelu of opset 20"),
    ],
)
def test_an_operator_that_cannot_be_converted_is_named(tmp_path, node, opset, named):
    message = refusal(write(tmp_path / "op.onnx", [node], arrays_of(network()), opset=opset))
    assert named in message
    assert "opset_version=17" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (b"\x08\xff\xff nonsense", "no ONNX model"),
        (b"", "no"),
    ],
)
def test_a_file_that_is_no_model(tmp_path, content, reason):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    message = refusal(path)
    assert reason in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ([("x", ["N", 1, 8, 8]), ("other", [1])], None, "has 2 inputs (x, other)"),
        (None, [("y", ["N", 10]), ("r", ["N", 4, 3, 3])], "has 2 outputs (y, r)"),
        ([("x", ["N", 1, 8, 8], TensorProto.FLOAT16)], None, "FLOAT16, not float32"),
        ([("x", ["N", 64])], None, "shape [?,64], not [N,C,H,W]"),
        ([("x", ["N", 8, 8, 1])], None, "channels come first"),
        ([("x", ["N", 3, 32, 32])], None, "takes images [3,32,32], digits has (1, 8, 8)"),
        (None, [("y", ["N", 7])], "returns 7 classes, digits has 10"),
    ],
)
def test_graphs_that_do_not_fit_are_refused_before_they_are_converted(tmp_path, inputs, outputs, reason):
    path = write(
        tmp_path / "unfit.onnx", [*CONVOLUTION, FLATTEN, LINEAR], arrays_of(network()), inputs, outputs
    )
    with pytest.raises(UserError, match=r"onnx:.*unfit\.onnx") as caught:
        named_model(f"onnx:{path}", DIGITS)
    assert reason in str(caught.value)


def test_weights_in_a_further_file_count_in_the_sha256(tmp_path):
    digests, folder = set(), tmp_path
    for seed in (0, 1):
        (folder := tmp_path / str(seed)).mkdir()
        external = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
        path = write(
            folder / "net.onnx", [*CONVOLUTION, FLATTEN, LINEAR], arrays_of(network(seed)), **external
        )
        digests.add(named_model(f"onnx:{path}", DIGITS).card.weights.sha256)
        torch.testing.assert_close(load(path)(images(2)), network(seed)(images(2)), rtol=1e-5, atol=1e-6)
    assert len(digests) == 2
    (folder / "weights.bin").unlink()
    assert "no ONNX model" in refusal(folder / "net.onnx")


def test_absent_package_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    message = refusal(file)
    assert "pip install 'robbench[onnx]'" in message
