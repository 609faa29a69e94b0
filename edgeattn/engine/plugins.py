"""The plugin library as a file: what it holds, and whether it serves the nodes of a graph.

The table of variants is read from the file's bytes, so that a Jetson's library can be judged on any
machine and nothing is loaded before it is known to fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.engine.embed_cubins import TABLE_MARKER
from edgeattn.errors import BundleError, LoweringError, RuntimeInputError
from edgeattn.ops import ALL_OPS, find_op
from edgeattn.ops.spec import DOMAIN, Shape, bind

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

LIBRARY = "libedgeattn_plugins.so"
# That of plugins/include/edgeattn/plugins.h; a test compares them.
PLUGIN_ABI = 1

_ELF, _ELF_TYPES = b"\x7fELF", {62: "x86_64", 183: "aarch64"}  # e_machine, ELF specification
# The GPUs that run the code of lower ones of their major version; all others run only their own
# (cubins for 90 and above use features of that one part, and 87 is no desktop part).
_ORDINARY = (75, 80, 86, 89)


@dataclass(frozen=True)
class CompiledVariant:
    """One kernel in the library.

    Attributes:
        kernel: "operator.kernel".
        dtype: of the tensors it reads and writes.
        constants: what it was compiled for, by name.
        sm: the GPU it was compiled for.
    """

    kernel: str
    dtype: str
    constants: Mapping[str, int | str]
    sm: int


@dataclass(frozen=True)
class PluginLibrary:
    """What a library says of itself.

    Attributes:
        path: the file.
        abi: see `PLUGIN_ABI`.
        arch: "x86_64" or "aarch64".
        tensorrt_headers: version it was compiled against; it loads in any from 10.3 on.
        triton: version of the compiler of its kernels.
        kernels_sha256: of all its kernels.
        ops: names of the operators it has plugins for.
        variants: its kernels.
        bytes: size of the file.
    """

    path: Path
    abi: int
    arch: str
    tensorrt_headers: str
    triton: str
    kernels_sha256: str
    ops: tuple[str, ...]
    variants: tuple[CompiledVariant, ...]
    bytes: int

    @property
    def sms(self) -> tuple[int, ...]:
        """The GPUs it has kernels for."""
        return tuple(sorted({variant.sm for variant in self.variants}))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "path": str(self.path)}

    def require(self, arch: str) -> None:
        """Refuses a library for another processor.

        Raises:
            BundleError: its architecture is another.
        """
        if self.arch != arch:
            raise BundleError(
                expected=f"a plugin library for {arch}",
                came=f"{self.path} is for {self.arch}",
                todo=f"build one with edgeattn plugins build --arch {arch}",
            )


def read_library(path: Path) -> PluginLibrary:
    """Reads the table of a library without loading it.

    Raises:
        BundleError: there is no such file, or it is no library of edgeattn's plugins, or one of
            another ABI.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        came = "there is none" if not path.exists() else f"the system says: {error.strerror}"
        raise _no_library(path, came) from error
    machine = int.from_bytes(content[18:20], "little")
    if not content.startswith(_ELF) or machine not in _ELF_TYPES:
        raise _no_library(path, "it is no shared library for x86-64 or aarch64")
    marker = b"\0" + TABLE_MARKER.encode()
    begin = content.find(marker)
    if begin < 0:
        raise _no_library(path, "it holds no table of edgeattn's kernels")
    begin += len(marker)
    try:
        table = json.loads(content[begin : content.index(b"\0", begin)])
        if table["abi"] != PLUGIN_ABI:  # its other fields may mean something else
            raise _other_abi(path, table["abi"])
        variants = tuple(CompiledVariant(**variant) for variant in table.pop("variants"))
        ops = tuple(table.pop("ops"))
        library = PluginLibrary(path, ops=ops, variants=variants, bytes=len(content), **table)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_library(path, f"its table does not read ({error})") from error
    if library.arch != _ELF_TYPES[machine]:
        raise _no_library(path, f"it says {library.arch} and is for {_ELF_TYPES[machine]}")
    return library


def _no_library(path: Path, came: str) -> BundleError:
    return BundleError(
        expected=f"edgeattn's plugin library at {path}",
        came=came,
        todo="make one with edgeattn plugins build",
    )


def _other_abi(path: Path, abi: object) -> BundleError:
    return BundleError(
        expected=f"a plugin library of ABI {PLUGIN_ABI}",
        came=f"{path} is of ABI {abi}",
        todo="build it with this edgeattn: edgeattn plugins build",
    )


@dataclass(frozen=True)
class PluginNode:
    """One node of domain edgeattn.

    Attributes:
        name: of the node.
        op: of the operator.
        dtype: of its first input.
        shapes: of its inputs; None for a dimension that is not fixed.
        attributes: all of the operator's.
        dtypes: of the operator's `choices`.
    """

    name: str
    op: str
    dtype: str
    shapes: tuple[Shape, ...]
    attributes: Mapping[str, Any]
    dtypes: Mapping[str, str] = field(default_factory=dict)


def plugin_nodes(model: ModelProto) -> list[PluginNode]:
    """The nodes of domain edgeattn in a graph, whose weights need not be loaded.

    Raises:
        LoweringError: one is unknown, or stands where its plugin would not be counted.
    """
    import onnx

    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    _require_top_level(model)
    if not nodes:
        return []
    known = _value_types(model.graph)
    if any(name not in known or _unknown(known[name][1]) for node in nodes for name in node.input):
        # With the sizes that graphs compute for reshaping: heads are split with them.
        inferred = _value_types(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
        # What the graph declares stays where inference found out nothing more.
        known |= {n: found for n, found in inferred.items() if n not in known or found[1]}
    return [_plugin_node(node, known) for node in nodes]


def _unknown(shape: Shape | None) -> bool:
    return shape is None or None in shape


def _require_top_level(model: ModelProto) -> None:
    inside = [(f"function {f.name}", node) for f in model.functions for node in f.node]
    inside = [(where, below) for where, node in inside for below in (node, *_nested(node))]
    inside += [("a subgraph", below) for node in model.graph.node for below in _nested(node)]
    for where, node in inside:
        if node.domain == DOMAIN:
            raise LoweringError(
                expected="operators of domain edgeattn in the graph itself",
                came=f"{where} has node {node.name or node.op_type}",
                todo="export the model without a loop or branch around it",
            )


def _nested(node: NodeProto) -> Iterator[NodeProto]:
    """The nodes of a node's subgraphs."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for below in graph.node:
                yield below
                yield from _nested(below)


def require_variants(library: PluginLibrary, nodes: Iterable[PluginNode], sm: int) -> None:
    """Refuses a graph some of whose nodes have no kernel in the library.

    Operators that have no plugin keep their function body.

    Args:
        library: that TensorRT will load.
        nodes: of the graph.
        sm: of the GPU that will run it.

    Raises:
        LoweringError: naming the node and what is missing.
    """
    for node in nodes:
        if find_op(node.op).plugin and node.op not in library.ops:
            raise LoweringError(
                expected=f"the plugin {node.op}, for node {node.name}",
                came=f"{library.path} has {', '.join(library.ops) or 'none'}",
                todo="build a library with this edgeattn: edgeattn plugins build",
            )
        if node.op not in library.ops:
            continue
        needed = list(_needed(node))
        if not needed:
            shapes = ", ".join(str(list(shape)).replace("None", "?") for shape in node.shapes)
            raise LoweringError(
                expected=f"fixed dimensions that say which kernels node {node.name} needs",
                came=f"its inputs are {shapes}",
                todo="export it with fixed head dimensions",
            )
        for kernel, constants in needed:
            found = [v for v in library.variants if v.kernel == kernel and v.dtype == node.dtype]
            found = [v for v in found if constants.items() <= v.constants.items()]
            if not any(runs_on(sm, variant.sm) for variant in found):
                _refuse(library, node, kernel, constants, sm, [v.sm for v in found])


def require_states(library: PluginLibrary, model: ModelProto) -> None:
    """Refuses a graph with a state that TensorRT cannot update in place.

    That is a constant whose next value is no output of the graph (measured with TensorRT-RTX 1.7,
    whose builder fails an assertion).

    Args:
        library: that TensorRT will load.
        model: whose nodes `plugin_nodes` has read.

    Raises:
        LoweringError: naming the node and the state.
    """
    constants = _constants(model.graph)
    given_back = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type not in library.ops:
            continue
        spec = find_op(node.op_type)
        given = {t.name: name for t, name in zip(spec.inputs, node.input, strict=True)}
        for tensor, name in zip(spec.outputs, node.output, strict=False):
            if tensor.updates and given[tensor.updates] in constants and name not in given_back:
                raise LoweringError(
                    expected=f"{tensor.updates} of node {node.name or node.op_type} as an input of "
                    "the graph, for TensorRT to update in place",
                    came=f"it is a constant, and {tensor.name} no output",
                    todo="export the model with its states as inputs and outputs",
                )


def _constants(graph: GraphProto) -> set[str]:
    """Values that depend on no input, which TensorRT computes while it builds."""
    found = {"", *(tensor.name for tensor in graph.initializer)}
    for node in graph.node:
        if found.issuperset(node.input):
            found.update(node.output)
    return found


def runs_on(sm: int, compiled: int) -> bool:
    """Whether a GPU runs a cubin that was compiled for another (CUDA programming guide)."""
    both = {sm, compiled} <= set(_ORDINARY)
    return sm == compiled or (both and sm // 10 == compiled // 10 and sm > compiled)


def expected_layers(library: PluginLibrary | None, nodes: Sequence[PluginNode]) -> int:
    """How many plugin layers TensorRT's network must have after the parse."""
    return sum(node.op in library.ops for node in nodes) if library else 0


def missing_plugins(model: ModelProto, nodes: Sequence[PluginNode]) -> set[str]:
    """Operators of `nodes` that have no function body, so that only a plugin can compute them."""
    bodies = {function.name for function in model.functions if function.domain == DOMAIN}
    return {node.op for node in nodes} - bodies


def _needed(node: PluginNode) -> Iterator[tuple[str, Mapping[str, int]]]:
    spec = find_op(node.op)
    if spec.variants is None:
        return
    try:
        spec.output_shapes(*node.shapes, **node.attributes)
    except RuntimeInputError as error:
        raise LoweringError(
            expected=f"{error.expected}, in node {node.name}",
            came=error.came,
            todo=f"correct the model: edgeattn ops {spec.name} says what it takes",
        ) from error
    try:
        dims = {**bind(spec.inputs, node.shapes), **node.dtypes}
        yield from spec.variants(dims, node.attributes)
    except RuntimeInputError as error:
        raise LoweringError(
            expected=f"{error.expected} for the kernels of node {node.name}",
            came=error.came,
            todo="export with --no-plugins: the function body has no such limit",
        ) from error


def _refuse(
    library: PluginLibrary,
    node: PluginNode,
    kernel: str,
    constants: Mapping[str, int],
    sm: int,
    others: Sequence[int],
) -> None:
    numbers = " ".join(f"{name}={value}" for name, value in constants.items())
    elsewhere = f"it holds that for SM {', '.join(map(str, sorted(set(others))))}"
    raise LoweringError(
        expected=f"kernel {kernel} in {node.dtype} with {numbers} on SM {sm} for node {node.name}",
        came=f"{library.path} has none" + (f"; {elsewhere}" if others else ""),
        todo=f"build a library with edgeattn plugins build --sm {sm}",
    )


def _plugin_node(node: NodeProto, known: Mapping[str, tuple[str, Shape | None]]) -> PluginNode:
    import onnx

    if node.op_type not in {spec.name for spec in ALL_OPS}:
        raise LoweringError(
            expected="operators of domain edgeattn that this edgeattn knows",
            came=f"node {node.name} is a {node.op_type}",
            todo="use the edgeattn that exported the graph",
        )
    spec = find_op(node.op_type)
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    names = {attribute.name for attribute in spec.attributes}
    attributes = {n: v.decode() if isinstance(v, bytes) else v for n, v in given.items()}
    complete = spec.complete_attributes({n: v for n, v in attributes.items() if n in names})
    if len(node.input) != len(spec.inputs):
        raise LoweringError(
            expected=f"{len(spec.inputs)} inputs of node {node.name} ({spec.name})",
            came=f"it has {len(node.input)}",
            todo="use the edgeattn that exported the graph",
        )
    shapes = []
    for tensor, name in zip(spec.inputs, node.input, strict=True):
        shape = known.get(name, ("", None))[1]
        shapes.append(shape if shape is not None else (None,) * len(tensor.shape))
    found = [known.get(name, ("unknown", None))[0] for name in node.input]
    of_variables = {t.variable: dtype for t, dtype in zip(spec.inputs, found, strict=True)}
    dtypes = {name: of_variables[name] for name in spec.choices}
    label = node.name or node.op_type
    return PluginNode(label, node.op_type, found[0], tuple(shapes), complete, dtypes)


def _value_types(graph: GraphProto) -> dict[str, tuple[str, Shape | None]]:
    """Dtype and shape of the values a graph declares; None where a shape is not known."""
    import onnx

    names = {
        onnx.TensorProto.FLOAT: "fp32",
        onnx.TensorProto.FLOAT16: "fp16",
        onnx.TensorProto.BFLOAT16: "bf16",
        onnx.TensorProto.INT8: "int8",
    }
    found: dict[str, tuple[str, Shape | None]] = {
        tensor.name: (names.get(tensor.data_type, "another dtype"), tuple(tensor.dims))
        for tensor in graph.initializer
    }
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = None
        if kind.HasField("shape"):
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        found[value.name] = (names.get(kind.elem_type, "another dtype"), shape)
    return found
