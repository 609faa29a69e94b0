"""What torch's operators of domain `edgeattn` become: nodes, with their function bodies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values

from edgeattn.models.static_cache import TENSOR_SCATTER
from edgeattn.ops import ALL_OPS, find_op
from edgeattn.ops.spec import DOMAIN, OP_VERSION, PLUGIN_ATTRIBUTES, OpSpec
from edgeattn.ops.torch_ops import TORCH_OPS

_OPSET = values.Opset(DOMAIN, OP_VERSION)
# The first standard opset with TensorScatter.
_STANDARD = values.Opset("", 24)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`: each operator as one node.

    The functions must then be attached (`attach_functions`).
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {TENSOR_SCATTER: _tensor_scatter}
    for spec in ALL_OPS:
        assert spec.name in TORCH_OPS
        _register_schema(spec)
        operator = getattr(getattr(torch.ops, DOMAIN), spec.snake_name).default
        table[operator] = _translation(spec)
    return table


def _tensor_scatter(past: Any, new: Any, write_indices: Any) -> Any:
    return _STANDARD.TensorScatter(past, new, write_indices, axis=2, mode="linear")


def _translation(spec: OpSpec) -> Callable[..., Any]:
    def translate(*inputs: Any, impl: str = "reference", **attributes: Any) -> Any:
        complete = spec.complete_attributes(attributes)
        return getattr(_OPSET, spec.name)(*inputs, **complete, **PLUGIN_ATTRIBUTES)

    return translate


def _register_schema(spec: OpSpec) -> None:
    """The exporter builds nodes of known schemas only."""
    if onnx.defs.has(spec.name, DOMAIN):
        return
    kinds = onnx.defs.OpSchema.AttrType
    strings = dict.fromkeys(PLUGIN_ATTRIBUTES, kinds.STRING)
    types = {a.name: getattr(kinds, a.type.upper()) for a in spec.attributes} | strings
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            spec.name,
            DOMAIN,
            OP_VERSION,
            inputs=[onnx.defs.OpSchema.FormalParameter(t.name, t.variable) for t in spec.inputs],
            outputs=[onnx.defs.OpSchema.FormalParameter(t.name, t.variable) for t in spec.outputs],
            type_constraints=_constraints(spec),
            attributes=[
                onnx.defs.OpSchema.Attribute(name, kind, "", required=False)
                for name, kind in types.items()
            ],
        )
    )


_ONNX_TYPES = {
    "fp32": "tensor(float)",
    "fp16": "tensor(float16)",
    "bf16": "tensor(bfloat16)",
    "int32": "tensor(int32)",
    "int8": "tensor(int8)",
    "bool": "tensor(bool)",
}


def _constraints(spec: OpSpec) -> list[tuple[str, list[str], str]]:
    variables = {t.variable: t.dtypes for t in (*spec.inputs, *spec.outputs)}
    return [(name, [_ONNX_TYPES[d] for d in dtypes], "") for name, dtypes in variables.items()]


def attach_functions(model: ir.Model) -> None:
    """Adds the function body of every edgeattn node, in the opset of the model."""
    names = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in sorted(names):
        function = find_op(name).function_body(model.graph.opset_imports[""])
        model.functions.setdefault(function.identifier(), function)
    if names:
        model.graph.opset_imports[DOMAIN] = OP_VERSION
