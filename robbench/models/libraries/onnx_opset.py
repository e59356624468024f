"""ONNX graphs of today's exporters in the words of opset 17, which onnx2torch knows in full.

Every change is exact for float32: operators whose later versions only accept more types or have new attributes that are
not used are given their older version; axes and constants move to where older versions expect them.
"""

import copy
from typing import Any

OPSET = 17
# Operators that changed after opset 17 by more types or by attributes; none of these attributes may be present.
SAME: dict[str, tuple[str, ...]] = {
    "AveragePool": ("dilations",),
    "Cast": ("round_mode",),
    "Constant": (),
    "ConstantOfShape": (),
    "Conv": (),
    "Equal": (),
    "Flatten": (),
    "GlobalAveragePool": (),
    "GlobalMaxPool": (),
    "HardSwish": (),
    "Identity": (),
    "MaxPool": (),
    "Reshape": (),
    "Shape": (),
    "Squeeze": (),
    "Transpose": (),
    "Unsqueeze": (),
}
REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")
# Attributes that say what older versions do anyway.
DEFAULTS = {"noop_with_empty_axes": 0, "saturate": 1, "approximate": b"none"}


def lowered(onnx: Any, proto: Any) -> Any:
    """`proto` as a graph of opset 17, and `proto` itself where that cannot be said exactly."""
    opset = next((one.version for one in proto.opset_import if one.domain == ""), 0)
    changed = copy.deepcopy(proto)
    graph = changed.graph
    _constants_to_initializers(graph)
    _fold_identities(graph)
    values = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        _rewrite(onnx, graph, node, values)
    if opset <= OPSET:
        return changed
    if any(not _same(onnx, node, opset) for node in graph.node):
        return proto
    for one in changed.opset_import:
        if one.domain == "":
            one.version = OPSET
    return changed


def _same(onnx: Any, node: Any, opset: int) -> bool:
    """Whether the node means the same in opset 17."""
    if node.domain:
        return True
    try:
        since = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset, domain="").since_version
    except Exception:  # onnx knows no such operator; it is refused by name later
        return False
    if since <= OPSET:
        return True
    if node.op_type in REDUCTIONS:
        return len(node.input) == 1  # axes, where there are any, are an attribute by now
    new = SAME.get(node.op_type)
    return new is not None and not any(attribute.name in new for attribute in node.attribute)


def _constants_to_initializers(graph: Any) -> None:
    for node in [one for one in graph.node if one.op_type == "Constant"]:
        tensors = [attribute.t for attribute in node.attribute if attribute.name == "value"]
        if tensors:
            tensor = graph.initializer.add()
            tensor.CopyFrom(tensors[0])
            tensor.name = node.output[0]
            graph.node.remove(node)


def _fold_identities(graph: Any) -> None:
    """Copies of initializers, which exporters write for equal weights, become the initializers themselves."""
    held = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    renamed: dict[str, str] = {}
    for node in list(graph.node):
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
        if node.op_type == "Identity" and node.input[0] in held and node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
            graph.node.remove(node)


def _rewrite(onnx: Any, graph: Any, node: Any, values: dict[str, Any]) -> None:
    """One node, in place; it stays as it is where what it needs is not constant."""
    for attribute in [one for one in node.attribute if one.name in DEFAULTS]:
        if onnx.helper.get_attribute_value(attribute) == DEFAULTS[attribute.name]:
            node.attribute.remove(attribute)
    attributes = {attribute.name: attribute for attribute in node.attribute}
    constant = values.get(node.input[1]) if len(node.input) > 1 else None
    if node.op_type == "Reshape" and "allowzero" in attributes:
        if constant is not None and (onnx.numpy_helper.to_array(constant) != 0).all():
            node.attribute.remove(attributes["allowzero"])
    elif node.op_type in REDUCTIONS and constant is not None and "noop_with_empty_axes" not in attributes:
        axes = [int(axis) for axis in onnx.numpy_helper.to_array(constant)]
        del node.input[1:]
        if axes:
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
    elif node.op_type == "Gelu" and "approximate" not in attributes:
        _gelu(onnx, graph, node)


def _gelu(onnx: Any, graph: Any, node: Any) -> None:
    """x/2 (1 + erf(x / sqrt 2)), by operators that opset 17 has."""
    x, y = node.input[0], node.output[0]
    numbers = {f"{y}/root": 2**0.5, f"{y}/one": 1.0, f"{y}/half": 0.5}
    for name, value in numbers.items():
        graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, (), [value]))
    root, one, half = numbers
    steps = (
        ("Div", [x, root], f"{y}/scaled"),
        ("Erf", [f"{y}/scaled"], f"{y}/erf"),
        ("Add", [f"{y}/erf", one], f"{y}/sum"),
        ("Mul", [f"{y}/sum", half], f"{y}/share"),
        ("Mul", [x, f"{y}/share"], y),
    )
    place = list(graph.node).index(node)
    graph.node.remove(node)
    for offset, (kind, inputs, output) in enumerate(steps):
        graph.node.insert(place + offset, onnx.helper.make_node(kind, inputs, [output], name=output))
