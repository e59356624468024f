"""ONNX classifiers: `onnx:file.onnx`, converted to a PyTorch module by onnx2torch, so that they have gradients.

Needs the packages onnx and onnx2torch (pip install 'robbench[onnx]'). The graph has one input, float32 images [N,C,H,W]
in [0,1], and one output, logits [N,classes]; normalisation is part of the graph. The batch may be dynamic or fixed. A
conversion is not believed: when the model is loaded, its logits are compared with those of ONNX's reference evaluator,
and its gradient with finite differences.
"""

import copy
import hashlib
import importlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robbench.cards import Architecture, ModelCard, Weights
from robbench.core.download import is_html
from robbench.core.errors import UserError
from robbench.core.random import SampleRandom
from robbench.core.resources import sha256_file
from robbench.models.entry import ModelRequest, ZooEntry
from robbench.models.gradient import check_gradient
from robbench.models.libraries.onnx_opset import lowered
from robbench.models.sources import Scheme
from robbench.models.zoo import checkpoint_folders

EXPORT = "export it with torch.onnx.export(..., dynamo=False, opset_version=17)"
PROBES = 3  # images on which the conversion is tried, together and one by one
OUTPUT_TOLERANCE = 1e-3  # of the largest logit: float32 sums in another order, layer after layer
BATCH_TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order differ by about 1e-6 of it


@dataclass(frozen=True)
class Graph:
    """An ONNX file that robbench can take.

    Attributes:
        path: the file.
        original: the model with its weights.
        proto: the same in operators that can be converted.
        batch: the fixed batch size, or None.
        sides: (channels, height, width), None where the graph leaves one open.
        classes: of the output, None where open.
        sha256: of the file.
    """

    path: Path
    original: Any
    proto: Any
    batch: int | None
    sides: tuple[int | None, int | None, int | None]
    classes: int | None
    sha256: str

    @property
    def where(self) -> str:
        """How messages name the graph."""
        return f"--model 'onnx:{self.path}'"

    @property
    def operators(self) -> list[str]:
        """Types of its nodes, sorted."""
        return sorted({str(node.op_type) for node in self.proto.graph.node})


def from_file(name: str, requested: ModelRequest) -> ZooEntry:
    """The ONNX file `name`, a path, also below --checkpoints. It is converted when the model is loaded."""
    graph = read_graph(_file(name, requested.checkpoints))
    shape = _shape(graph, requested)
    if None not in (graph.classes, requested.classes) and graph.classes != requested.classes:
        raise UserError(
            f"{graph.where} returns {graph.classes} classes, {requested.dataset} has {requested.classes}; "
            f"give a model of that data set"
        )
    card = ModelCard(
        name=f"onnx-{re.sub(r'[^A-Za-z0-9._-]', '-', graph.path.stem)}"[:100],
        kind="classifier",
        description=f"ONNX file {graph.path.name}",
        dataset=requested.dataset,
        defense="standard",
        architecture=Architecture(name=f"onnx:{graph.path.name}"),
        input_shape=shape,
        classes=graph.classes or requested.classes,
        weights=Weights(file=graph.path.name, sha256=graph.sha256),
        license="see its source",
    )
    return ZooEntry(card, graph.path.parent, requested.checkpoints, build=partial(convert, graph, shape))


def _file(name: str, checkpoints: Path | None) -> Path:
    path = Path(name).expanduser()
    found = [each for each in (path, *(f / path for f in checkpoint_folders(checkpoints))) if each.is_file()]
    if not found:
        raise UserError(f"--model 'onnx:{name}': {path} is no file; give the path of an .onnx file")
    return found[0]


def read_graph(path: Path) -> Graph:
    """The ONNX file at `path`, checked before it is converted; `UserError` that says what robbench cannot take."""
    where = f"--model 'onnx:{path}'"
    onnx, _ = _packages(where)
    try:
        external = _external_files(onnx, path)
        original = onnx.load(str(path))
    except Exception as error:  # protobuf and the reader of external data fail in their own ways
        what = "an HTML page" if is_html(path) else f"no ONNX model ({_short(error)})"
        raise UserError(f"{where}: the file is {what}; export or download it again") from error
    proto = lowered(onnx, original)
    _refuse_unsupported(proto, where, {one.domain: one.version for one in original.opset_import}.get("", 0))
    try:
        onnx.checker.check_model(proto)
    except Exception as error:
        raise UserError(f"{where}: the graph is not valid ONNX ({_short(error)}); {EXPORT}") from error
    image = _only([one for one in proto.graph.input if one.name not in _held(proto)], "input", where)
    logits = _only(list(proto.graph.output), "output", where)
    for value, what in ((image, "input"), (logits, "output")):
        if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
            raise UserError(
                f"{where}: its {what} {value.name!r} is {kind}, not float32; export images to logits"
            )
    sizes = _sizes(image)
    if len(sizes) != 4:
        raise UserError(
            f"{where}: its input has shape {_text(sizes)}, not [N,C,H,W]; export a model of images"
        )
    of_output = _sizes(logits)
    classes = of_output[1] if len(of_output) == 2 else None
    if classes == 1:
        raise UserError(f"{where}: its output has one value an image; export logits of two classes or more")
    return Graph(
        path, original, proto, sizes[0], (sizes[1], sizes[2], sizes[3]), classes, _digest(path, external)
    )


def _packages(where: str) -> tuple[Any, Any]:
    """onnx and onnx2torch."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old names in torch
            import onnx
            import onnx2torch
    except ImportError as error:
        raise UserError(
            f"{where} needs the packages onnx and onnx2torch ({_short(error)}); pip install 'robbench[onnx]'"
        ) from error
    return onnx, onnx2torch


def _external_files(onnx: Any, path: Path) -> list[Path]:
    """Files beside `path` that hold tensors of the graph."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return sorted(
        {
            path.parent / entry.value
            for tensor in _tensors(graph)
            for entry in tensor.external_data
            if entry.key == "location"
        }
    )


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for attribute in (one for node in graph.node for one in node.attribute):
        yield from [attribute.t, *attribute.tensors]


def _digest(path: Path, external: list[Path]) -> str:
    """sha256 of the file; with weights in further files, that of all their sha256, one a line."""
    digests = [sha256_file(each) for each in (path, *external)]
    return (
        digests[0]
        if not external
        else hashlib.sha256("".join(f"{d}\n" for d in digests).encode()).hexdigest()
    )


def _refuse_unsupported(proto: Any, where: str, opset: int) -> None:
    """`UserError` that names the operators onnx2torch cannot convert."""
    from onnx2torch.node_converters import get_converter

    versions = {one.domain: one.version for one in proto.opset_import}
    unknown = set()
    for node in proto.graph.node:
        try:
            get_converter(node.op_type, versions.get(node.domain, 0), node.domain)
        except NotImplementedError:
            unknown.add(f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
    if unknown:
        raise UserError(
            f"{where}: onnx2torch cannot convert operator {', '.join(sorted(unknown))} of opset {opset}; {EXPORT}, "
            f"or load the PyTorch model by a card"
        )


def _only(values: list[Any], what: str, where: str) -> Any:
    if len(values) == 1:
        return values[0]
    names = ", ".join(value.name for value in values) or "none"
    raise UserError(
        f"{where}: the graph has {len(values)} {what}s ({names}), not one; export the classifier alone"
    )


def _sizes(value: Any) -> list[int | None]:
    """Sizes of an input or output; None for a dynamic one."""
    return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]


def _shape(graph: Graph, requested: ModelRequest) -> tuple[int, int, int]:
    """The images' shape: what the graph fixes, else what is requested; `UserError` when they differ."""
    sides = requested.shape or graph.sides
    known = [size for size in sides if size is not None]
    if len(known) < 3:
        raise UserError(
            f"{graph.where}: its input {_text([graph.batch, *graph.sides])} is open; fix its sizes"
        )
    channels, height, width = known
    if any(size not in (None, own) for size, own in zip(graph.sides, known, strict=True)):
        last = graph.sides == (height, width, channels)
        raise UserError(
            f"{graph.where} takes images {_text(list(graph.sides))}, {requested.dataset} has "
            f"{(channels, height, width)}; "
            + (
                "put a Transpose in front of it: robbench's channels come first"
                if last
                else "give a data set of them"
            )
        )
    return channels, height, width


def _text(sizes: list[int | None]) -> str:
    return f"[{','.join('?' if size is None else str(size) for size in sizes)}]"


def _short(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


class OneByOne(nn.Module):
    """A network for a batch of exactly one image, applied to each image of a batch [N,C,H,W] by itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.network(image) for image in torch.split(x, 1)])


def convert(graph: Graph, shape: tuple[int, int, int]) -> nn.Module:
    """The graph as a module whose outputs do not depend on the batch and whose gradient was checked."""
    _, onnx2torch = _packages(graph.where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about arrays that are not writable
            network: nn.Module = onnx2torch.convert(copy.deepcopy(graph.proto))
    except Exception as error:  # its converters fail in their own ways
        raise UserError(
            f"{graph.where}: onnx2torch cannot convert it ({type(error).__name__}: {_short(error)}); {EXPORT}"
        ) from error
    network = network.eval().requires_grad_(False)
    images = 0.5 + 0.5 * SampleRandom(0, "onnx").uniform(range(PROBES), shape)
    network = _for_batches(graph, network, images)
    _check_outputs(graph, network, images[:1])
    _check_gradient(graph, network, images[:1])
    return network


def _for_batches(graph: Graph, network: nn.Module, images: Tensor) -> nn.Module:
    """`network`, or `OneByOne` of it where the graph was exported for a batch of 1 and relies on it."""
    together, alone = _logits(graph, network, images), _logits(graph, OneByOne(network), images)
    if isinstance(together, Tensor) and isinstance(alone, Tensor) and together.shape == alone.shape:
        gap = float((together - alone).abs().max())
        if gap <= BATCH_TOLERANCE * max(1.0, float(alone.abs().max())):
            return network
        problem = f"the outputs for an image change by {gap:.3g} with the images beside it"
    else:
        problem = str(alone if isinstance(alone, str) else together)
    if graph.batch == 1 and isinstance(alone, Tensor):
        return OneByOne(network)
    if graph.batch not in (None, 1):
        raise UserError(
            f"{graph.where} was exported for batches of exactly {graph.batch} images ({problem}); "
            f"export it with a dynamic batch or a batch of 1"
        )
    raise UserError(
        f"{graph.where}: {problem}; export it in evaluation mode, for images {tuple(images.shape[1:])}"
    )


def _logits(graph: Graph, network: nn.Module, images: Tensor) -> Tensor | str:
    """Its outputs [N,K], or why they are none."""
    try:
        with torch.no_grad():
            logits = network(images)
    except Exception as error:  # a reshape that expects another batch, for one
        return f"it fails on {len(images)} images ({type(error).__name__}: {_short(error)})"
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        return f"it returns {shape} for {len(images)} images, not [{len(images)},classes]"
    if logits.shape[1] < 2:
        return "it returns one value an image, not logits of two classes or more"
    if not logits.is_floating_point() or not bool(logits.isfinite().all()):
        what = (
            "values that are not finite" if logits.is_floating_point() else f"{logits.dtype}, labels for one"
        )
        return f"it returns {what}, not logits"
    return logits


def _check_outputs(graph: Graph, network: nn.Module, image: Tensor) -> None:
    """`UserError` when the module's logits are not those that ONNX's reference evaluator computes from the file."""
    onnx, _ = _packages(graph.where)
    with torch.no_grad():
        logits = network(image)
    try:
        run = importlib.import_module("onnx.reference").ReferenceEvaluator(graph.original).run
        name = next(one.name for one in graph.proto.graph.input if one.name not in _held(graph.proto))
        batch = image.expand(graph.batch or 1, -1, -1, -1).numpy()
        expected = torch.from_numpy(run(None, {name: batch})[0][:1].copy())
    except Exception as error:  # an operator of which it has no implementation
        raise UserError(
            f"{graph.where}: the conversion cannot be checked, because onnx {onnx.__version__} itself cannot run the "
            f"file ({type(error).__name__}: {_short(error)}); {EXPORT}"
        ) from error
    gap = float((logits - expected).abs().max()) if logits.shape == expected.shape else float("inf")
    allowed = OUTPUT_TOLERANCE * max(1.0, float(expected.abs().max()))
    if not gap <= allowed:
        raise UserError(
            f"{graph.where}: the conversion is wrong: its logits are off by {gap:.3g} from those of the file (allowed "
            f"{allowed:.2g}); load the PyTorch model by a card, or export it without the operator that is converted "
            f"wrongly ({', '.join(graph.operators)})"
        )


def _held(proto: Any) -> set[str]:
    """Names of the tensors that a graph holds; old files list them among the inputs."""
    return {tensor.name for tensor in proto.graph.initializer}


def _check_gradient(graph: Graph, network: nn.Module, image: Tensor) -> None:
    """`UserError` with the numbers when autograd and finite differences disagree, or there is no gradient."""
    dtype = torch.float32 if _rounds_to_float32(graph) else torch.float64
    operators = ", ".join(graph.operators)
    try:
        check = check_gradient(copy.deepcopy(network).to(dtype), image, dtype)
    except RuntimeError as error:
        raise UserError(
            f"{graph.where} has no gradient ({_short(error)}); an operator of it cannot be differentiated: {operators}"
        ) from error
    if not check.wrong:
        return
    worst = max(check.wrong, key=lambda i: float((check.autograd[i] - check.differences[i]).abs()))
    raise UserError(
        f"{graph.where}: the converted gradient is wrong at {len(check.wrong)} of {len(check.coordinates)} values "
        f"of an image: at {check.coordinates[worst]} autograd gives {float(check.autograd[worst]):.6g}, finite "
        f"differences {float(check.differences[worst]):.6g} (allowed {check.allowed:.2g}); load the PyTorch model by a "
        f"card, or export it without the operator that is converted wrongly ({operators})"
    )


def _rounds_to_float32(graph: Graph) -> bool:
    """Whether a cast in the graph rounds to float32 or less, which makes float64 differences as noisy as that."""
    narrow = (1, 10, 16)  # TensorProto.FLOAT, FLOAT16, BFLOAT16
    casts = (node for node in graph.proto.graph.node if node.op_type == "Cast")
    return any(one.name == "to" and one.i in narrow for node in casts for one in node.attribute)


SCHEME = Scheme(model=from_file)
