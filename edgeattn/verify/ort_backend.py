"""A bundle's model.onnx in ONNX Runtime on the CPU as a backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeattn.planner.lowering import Lowering
from edgeattn.runtime.kv_buffer import PAST, PRESENT, InPlaceRunner, Prefix
from edgeattn.runtime.onnxruntime_backend import open_onnxruntime
from edgeattn.verify.cases import StepInputs

if TYPE_CHECKING:
    from onnx import ModelProto

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
# Room for the longest case, so that caches are appended to in place.
_CONTEXT = 64


class OrtBackend:
    """Runs the ONNX file exactly (no int8 activations), on the CPU.

    ONNX Runtime's CPU has no bf16 kernels: a bf16 graph is widened in memory, its weights cast to
    fp32 as they are read. That proves the graph and the stored weights, not bf16 arithmetic, and
    the backend's name says so.

    Args:
        model: model.onnx; its weights lie beside it.
        lowering: dtype and cache of the bundle.
        hidden: also give the residual stream after each layer as outputs. The file stays as it is.
        expose: names of further values to give.
    """

    def __init__(
        self,
        model: Path,
        lowering: Lowering,
        *,
        hidden: bool = False,
        expose: Sequence[str] = (),
    ) -> None:
        dtype = lowering.dtype
        self.name = "onnxruntime" + (" (bf16 widened to fp32)" if dtype == "bf16" else "")
        source: Path | bytes = model
        if hidden or expose or dtype == "bf16":
            source = _rewritten(model, hidden=hidden, expose=expose, widen=dtype == "bf16")
        self._session = open_onnxruntime(source, weights_dir=model.parent, exact=True)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._past = {i.name: i for i in self._session.get_inputs() if i.name.startswith(PAST)}
        self.packed_cache = lowering.packs_cache
        self._in_place: InPlaceRunner | None = None
        if lowering.kv_cache == "shared-buffer":
            further = [n for n in self._outputs if n.startswith("hidden.") or n in expose]
            self._in_place = InPlaceRunner(self._session, _CONTEXT, further)

    def step(self, inputs: StepInputs, past: Mapping[str, object] | None) -> Mapping[str, object]:
        """See `edgeattn.verify.drive.Backend.step`."""
        feeds: dict[str, object] = {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "position_ids": inputs.position_ids,
        }
        if self._in_place is not None:
            return self._step_in_place(self._in_place, inputs, past)
        for name, declared in self._past.items():
            if past is None:
                heads, head_dim = declared.shape[1], declared.shape[3]
                size = (inputs.input_ids.shape[0], heads, 0, head_dim)
                feeds[name] = np.zeros(size, dtype=_DTYPES[declared.type])
            else:
                feeds[name] = past[name.replace(PAST, PRESENT)]
        values = self._session.run(self._outputs, feeds)
        return dict(zip(self._outputs, values, strict=True))

    def _step_in_place(
        self, runner: InPlaceRunner, inputs: StepInputs, past: Mapping[str, object] | None
    ) -> Mapping[str, object]:
        """As the runtime does it, so that the proof is about what will run."""
        before = None if past is None else past["cache"]
        assert before is None or isinstance(before, Prefix)
        outputs, cache = runner.run(vars(inputs), before)
        return {**outputs, **cache.tensors(), "cache": cache}

    def to_numpy(self, value: object) -> NDArray[np.float32]:
        """See `edgeattn.verify.drive.Backend.to_numpy`."""
        assert isinstance(value, np.ndarray)
        return value.astype(np.float32)


def _rewritten(model: Path, *, hidden: bool, expose: Sequence[str], widen: bool) -> bytes:
    """The graph of `model`, its weights still external, with the changes asked for."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    if hidden:
        _add_hidden_outputs(proto)
    known = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    # Without a type: ONNX Runtime infers it.
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in expose if name not in known
    )
    if widen:
        _widen(proto)
    serialized: bytes = proto.SerializeToString()
    return serialized


def _add_hidden_outputs(proto: ModelProto) -> None:
    import onnx

    known = {output.name for output in proto.graph.output}
    kind = next(o for o in proto.graph.output if o.name == "logits").type.tensor_type.elem_type
    for node in proto.graph.node:
        for name in node.output:
            if name.startswith("hidden.") and name not in known:
                proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))


def _widen(proto: ModelProto) -> None:
    """Makes every bf16 value fp32, bf16 initialisers through a Cast."""
    import onnx

    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type == narrow:
            name, tensor.name = tensor.name, f"{tensor.name}.bf16"
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=wide))
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == narrow:
                attribute.i = wide
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    del proto.graph.value_info[:]
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
