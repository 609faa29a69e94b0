"""A bundle's model.onnx in ONNX Runtime as a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeattn.planner.lowering import Lowering
from edgeattn.runtime.in_place import InPlaceRunner, free_capacity, runner_for
from edgeattn.runtime.kv_buffer import NUMPY_DTYPES, PAST, PRESENT, Prefix, empty_shape
from edgeattn.runtime.layout import Layout
from edgeattn.runtime.onnxruntime_backend import open_onnxruntime
from edgeattn.runtime.providers import provider_options, widen_boundary
from edgeattn.verify.cases import RAGGED_LENGTHS, StepInputs

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

# Room for the longest case, so that caches are appended to in place.
_CONTEXT = 64
# What an engine of the TensorRT provider is made for, where the bundle names no context.
_CHECKED = 512


class OrtBackend:
    """A decoder's ONNX file, as `open_exactly` opens it.

    A static cache gets a capacity that fits the steps, as it does where the bundle runs
    (`edgeattn.runtime.in_place`).

    Args:
        model: model.onnx; its weights lie beside it.
        lowering: dtype and cache of the bundle.
        hidden: also give the residual stream after each layer as outputs. The file stays as it is.
        expose: names of further values to give.
        keep_rounding: see `open_exactly`.
        provider: "cpu", or "cuda" or "tensorrt" of onnxruntime-gpu.
    """

    def __init__(
        self,
        model: Path,
        lowering: Lowering,
        *,
        hidden: bool = False,
        expose: Sequence[str] = (),
        keep_rounding: bool = False,
        provider: str = "cpu",
    ) -> None:
        prepare = partial(_prepare, model=model, lowering=lowering, provider=provider)
        is_prepared = provider != "cpu" or lowering.kv_cache == "static"
        self.name, self._session = open_exactly(
            model,
            lowering,
            hidden=hidden,
            expose=expose,
            keep_rounding=keep_rounding,
            provider=provider,
            prepare=prepare if is_prepared else None,
        )
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._past = {i.name: i for i in self._session.get_inputs() if i.name.startswith(PAST)}
        self.packed_cache = lowering.packs_cache
        self._in_place: InPlaceRunner | None = None
        runner = runner_for(lowering.kv_cache)
        if runner is not None:
            further = [n for n in self._outputs if n.startswith("hidden.") or n in expose]
            self._in_place = runner(self._session, _CONTEXT, further)

    def step(self, inputs: StepInputs, past: Mapping[str, object] | None) -> Mapping[str, object]:
        """See `edgeattn.verify.drive.Backend.step`."""
        if self._in_place is not None:
            return self._step_in_place(self._in_place, inputs, past)
        feeds = {**vars(inputs), **self.past(len(inputs.input_ids), past)}
        values = self._session.run(self._outputs, feeds)
        return dict(zip(self._outputs, values, strict=True))

    def past(self, rows: int, before: Mapping[str, object] | None) -> dict[str, object]:
        """What the graph is given of the tokens before, by name of its input.

        Args:
            rows: B.
            before: what the previous step returned, None before the first.
        """
        if before is not None:
            return {name: before[name.replace(PAST, PRESENT)] for name in self._past}
        return {
            name: np.zeros(empty_shape(declared.shape, rows), NUMPY_DTYPES[declared.type])
            for name, declared in self._past.items()
        }

    def _step_in_place(
        self, runner: InPlaceRunner, inputs: StepInputs, past: Mapping[str, object] | None
    ) -> Mapping[str, object]:
        """As the runtime does it, so that the proof is about what will run."""
        before = None if past is None else past["cache"]
        assert before is None or isinstance(before, Prefix)
        layout = Layout(inputs.attention_mask, inputs.position_ids)
        # without padding the runner is told nothing
        told = None if layout.is_dense() else layout
        outputs, cache = runner.run(inputs.input_ids, before, told)
        return {**outputs, **cache.tensors(), "cache": cache}

    def to_numpy(self, value: object) -> NDArray[np.float32]:
        """See `edgeattn.verify.drive.Backend.to_numpy`."""
        assert isinstance(value, np.ndarray)
        return value.astype(np.float32)


def _prepare(
    proto: ModelProto, *, model: Path, lowering: Lowering, provider: str
) -> dict[str, str]:
    """Fits a decoder's graph to the steps of the proof; the provider's options."""
    options = {}
    if provider != "cpu":
        widen_boundary(proto, [v.name for v in (*proto.graph.input, *proto.graph.output)])
        sizes = {"context": lowering.context or _CHECKED, "batch": len(RAGGED_LENGTHS)}
        options = provider_options(proto, model, provider, **sizes)
    if lowering.kv_cache == "static":
        free_capacity(proto)
    return options


def open_exactly(
    model: Path,
    lowering: Lowering,
    *,
    hidden: bool,
    expose: Sequence[str],
    keep_rounding: bool,
    provider: str,
    prepare: Callable[[ModelProto], dict[str, str]] | None = None,
) -> tuple[str, InferenceSession]:
    """Opens the ONNX file exactly (no int8 activations), and says by which name it is reported.

    ONNX Runtime's CPU has no bf16 kernels: a bf16 graph is widened in memory, its weights cast to
    fp32 as they are read. That proves the graph and the stored weights, not bf16 arithmetic, and
    the name says so; a GPU computes in bf16.

    Args:
        model: model.onnx; its weights lie beside it.
        lowering: dtype of the bundle.
        hidden: also give the residual stream after each layer as outputs. The file stays as it is.
        expose: names of further values to give.
        keep_rounding: give them as the graph computes them; else ONNX Runtime may round them ahead
            for a reader. What runs does not keep it, so a proof of the whole graph does not either.
        provider: "cpu", or "cuda" or "tensorrt" of onnxruntime-gpu.
        prepare: changes the graph further and gives the provider's options.
    """
    on_gpu, options = provider != "cpu", dict[str, str]()
    widen = lowering.dtype == "bf16" and not on_gpu
    name = "onnxruntime" + (" (bf16 widened to fp32)" if widen else "")
    name += f" (provider {provider})" if on_gpu else ""
    source: Path | bytes = model
    if hidden or expose or widen or prepare:
        proto = _rewritten(model, hidden=hidden, expose=expose, widen=widen)
        options = prepare(proto) if prepare else {}
        source = proto.SerializeToString()
    session = open_onnxruntime(
        source,
        weights_dir=model.parent,
        exact=True,
        keep_rounding=keep_rounding,
        provider=provider,
        provider_options=options,
    )
    return name, session


def _rewritten(model: Path, *, hidden: bool, expose: Sequence[str], widen: bool) -> ModelProto:
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
    return proto


def _add_hidden_outputs(proto: ModelProto) -> None:
    import onnx

    known = {output.name for output in proto.graph.output}
    kind = proto.graph.output[0].type.tensor_type.elem_type
    for node in proto.graph.node:
        for name in node.output:
            # not what is made of it, as "hidden.0_rotated"
            is_hidden = name.startswith("hidden.") and name.removeprefix("hidden.").isdigit()
            if is_hidden and name not in known:
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
