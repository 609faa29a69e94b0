"""A bundle's model.onnx in ONNX Runtime on the CPU as a backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeattn.runtime.onnxruntime_backend import open_onnxruntime
from edgeattn.verify.cases import StepInputs


class OrtBackend:
    """Runs the ONNX file exactly (no int8 activations), on the CPU.

    Args:
        model: model.onnx; its weights lie beside it.
        hidden: also give the residual stream after each layer; the graph is then read into memory
            and these values made outputs, the file stays as it is.
    """

    name = "onnxruntime"

    def __init__(self, model: Path, *, hidden: bool = False) -> None:
        source = with_hidden_outputs(model) if hidden else model
        self._session = open_onnxruntime(source, weights_dir=model.parent, threads=None, exact=True)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._past = {
            i.name: i for i in self._session.get_inputs() if i.name.startswith("past_key_values.")
        }

    def step(self, inputs: StepInputs, past: Mapping[str, object] | None) -> Mapping[str, object]:
        """See `edgeattn.verify.drive.Backend.step`."""
        feeds: dict[str, object] = {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "position_ids": inputs.position_ids,
        }
        for name, declared in self._past.items():
            if past is None:
                heads, head_dim = declared.shape[1], declared.shape[3]
                size = (inputs.input_ids.shape[0], heads, 0, head_dim)
                dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[declared.type]
                feeds[name] = np.zeros(size, dtype=dtype)
            else:
                feeds[name] = past[name.replace("past_key_values.", "present.")]
        values = self._session.run(self._outputs, feeds)
        return dict(zip(self._outputs, values, strict=True))

    def to_numpy(self, value: object) -> NDArray[np.float32]:
        """See `edgeattn.verify.drive.Backend.to_numpy`."""
        assert isinstance(value, np.ndarray)
        return value.astype(np.float32)


def with_hidden_outputs(model: Path) -> bytes:
    """The graph of `model` with every "hidden.N" value as an output, weights still external."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    known = {output.name for output in proto.graph.output}
    kind = next(o for o in proto.graph.output if o.name == "logits").type.tensor_type.elem_type
    for node in proto.graph.node:
        for name in node.output:
            if name.startswith("hidden.") and name not in known:
                value = onnx.helper.make_tensor_value_info(name, kind, None)
                proto.graph.output.append(value)
    serialized: bytes = proto.SerializeToString()
    return serialized
