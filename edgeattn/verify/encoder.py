"""The proof of an encoder's bundle; `edgeattn.verify.verify` has the decoder's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeattn.encoder_shape import EncoderShape
from edgeattn.planner.lowering import Lowering
from edgeattn.verify.compare import KL, Agreement, compare_and_locate, distribution_agreement
from edgeattn.verify.drive import Tensors
from edgeattn.verify.encoder_golden import EncoderCase, EncoderGolden, encoder_cases, run_cases
from edgeattn.verify.failures import overflow_error
from edgeattn.verify.operators import Sample, watch_operators, with_operators
from edgeattn.verify.ort_backend import open_exactly
from edgeattn.verify.tolerance import plain_dtypes, plain_runs
from edgeattn.verify.verify import Progress, Verification, staged, with_tensorrt

if TYPE_CHECKING:
    import torch

    from edgeattn.models.attention import OperatorForm
    from edgeattn.models.encoder_model import EncoderModel


def record_encoder_golden(
    model: EncoderModel,
    lowering: Lowering,
    *,
    tokens: Sequence[int] | None,
    progress: Progress | None = None,
) -> EncoderGolden:
    """Runs the torch encoder of the recipe: the reference, and plain low precision beside it.

    Args:
        model: quantised as the recipe says.
        lowering: dtype and spelling.
        tokens: ids of a text to run, None for random ones.
        progress: called with (stage, done, total).

    Raises:
        ProofError: the model overflows the bundle's dtype, so that nothing could be compared.
    """
    from edgeattn.models.model import TORCH_DTYPES
    from edgeattn.verify.reference import REFERENCE_DTYPES

    context = lowering.context or model.shape.max_context
    cases = encoder_cases(model.shape, context, tokens)
    expected = _run_torch(model, lowering, cases, REFERENCE_DTYPES[lowering.dtype])
    golden = EncoderGolden(cases, expected, {})
    overflow = ""
    for dtype in plain_dtypes(lowering):
        plain = plain_runs(lowering, dtype)
        if progress:
            progress("torch", 1, 1 + len(plain))
        runs = [
            _run_torch(model, lowering, cases, TORCH_DTYPES[run.dtype], run.form) for run in plain
        ]
        found = [golden.errors(run, rounds=lowering.decides_at_run_time) for run in runs]
        largest = {name: max(run[name] for run in found) for name in found[0]}
        overflow = next((n for n, error in largest.items() if not math.isfinite(error)), "")
        if not overflow:
            if model.shape.task == "classification":
                largest[KL] = max(distribution_agreement(run, expected)[1] for run in runs)
            return replace(golden, low_precision_error=largest)
    raise overflow_error(lowering.dtype, overflow)


def prove_encoder(
    model: EncoderModel,
    lowering: Lowering,
    model_file: Path,
    golden_file: Path,
    *,
    tokens: Sequence[int] | None,
    operators_file: Path | None = None,
    plugin_library: Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """The whole proof of a fresh export; its golden vectors are written for later ones.

    Args:
        model: quantised as the recipe says.
        lowering: what was decided.
        model_file: the exported graph, its weights beside it.
        golden_file: where the golden vectors go.
        tokens: ids of a text to run, None for random ones.
        operators_file: where samples of edgeattn's own operators go, if the graph has any.
        plugin_library: that TensorRT-RTX loads here; None for the function bodies.
        progress: called with (stage, done, total).

    Raises:
        ProofError: ONNX Runtime disagrees with torch, or TensorRT refuses the graph.
    """
    golden = record_encoder_golden(model, lowering, tokens=tokens, progress=progress)
    golden.save(golden_file)
    agreement = _check_onnxruntime(model_file, golden, lowering, model.shape, "cpu", progress)
    samples = partial(sample_encoder_operators, model_file, lowering, golden.cases[-1])
    agreement = with_operators(agreement, samples, operators_file)
    verification = with_tensorrt(
        agreement, model_file, lowering, model.shape, plugin_library, progress
    )
    verification.raise_if_failed()
    return verification


def check_encoder(
    model_file: Path,
    golden: EncoderGolden,
    lowering: Lowering,
    shape: EncoderShape,
    *,
    tensorrt: bool = True,
    provider: str = "cpu",
    plugin_library: Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compares a graph with golden vectors; where they agree, TensorRT-RTX parses and builds it.

    Args:
        model_file: the graph, its weights beside it.
        golden: what it must reproduce.
        lowering: what was decided when it was exported.
        shape: of the encoder.
        tensorrt: whether to ask TensorRT-RTX, where the target has a TensorRT.
        provider: of ONNX Runtime: "cpu", "cuda" or "tensorrt".
        plugin_library: that TensorRT-RTX loads here; None for the function bodies.
        progress: called with (stage, done, total).
    """
    agreement = _check_onnxruntime(model_file, golden, lowering, shape, provider, progress)
    if not tensorrt:
        return Verification((agreement,), None)
    return with_tensorrt(agreement, model_file, lowering, shape, plugin_library, progress)


def _check_onnxruntime(
    model_file: Path,
    golden: EncoderGolden,
    lowering: Lowering,
    shape: EncoderShape,
    provider: str,
    progress: Progress | None,
) -> Agreement:
    """The bundle's own file; run again with the residual stream where the first error is sought."""
    stage = staged(progress, "ONNX Runtime")

    def run(hidden: bool) -> tuple[str, Tensors]:
        backend = EncoderBackend(model_file, lowering, hidden=hidden, provider=provider)
        return backend.name, run_cases(backend.run, golden.cases, stage)

    last = "what follows the last layer"
    return compare_and_locate(run, golden, lowering, shape.num_layers, last=last)


def sample_encoder_operators(
    model_file: Path, lowering: Lowering, case: EncoderCase, *, every: bool = False
) -> list[Sample]:
    """As `operators.sample_operators` does it for a decoder.

    Args:
        model_file: the graph.
        lowering: what was decided.
        case: what to run.
        every: all nodes; else the first of each operator and set of attributes.
    """
    watched = watch_operators(model_file, every=every)
    if not watched.nodes:
        return []
    backend = EncoderBackend(model_file, lowering, expose=watched.inner, keep_rounding=True)
    return watched.samples({**case.inputs, **backend.run_raw(case.inputs)})


class EncoderBackend:
    """An encoder's ONNX file, as `open_exactly` opens it.

    Args:
        model: model.onnx; its weights lie beside it.
        lowering: dtype of the bundle.
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
        self.name, self._session = open_exactly(
            model,
            lowering,
            hidden=hidden,
            expose=expose,
            keep_rounding=keep_rounding,
            provider=provider,
        )
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._dtypes = {value.name: _NUMPY[value.type] for value in self._session.get_inputs()}

    def run(
        self, inputs: Mapping[str, npt.NDArray[np.generic]]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """All outputs, by name, in fp32."""
        return {name: value.astype(np.float32) for name, value in self.run_raw(inputs).items()}

    def run_raw(
        self, inputs: Mapping[str, npt.NDArray[np.generic]]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """As `run`, each output in its own dtype."""
        feeds = {name: value.astype(self._dtypes[name]) for name, value in inputs.items()}
        found = self._session.run(self._outputs, feeds)
        return dict(zip(self._outputs, found, strict=True))


# Of the graph's inputs, by what ONNX Runtime calls them.
_NUMPY: Mapping[str, npt.DTypeLike] = {
    "tensor(int64)": np.int64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


def _run_torch(
    model: EncoderModel,
    lowering: Lowering,
    cases: Sequence[EncoderCase],
    dtype: torch.dtype,
    form: OperatorForm | None = None,
) -> Tensors:
    """The encoder in one precision; weights are rounded to the bundle's dtype first."""
    import torch

    from edgeattn.models.encoder_model import load_encoder
    from edgeattn.models.model import TORCH_DTYPES

    own: OperatorForm = "primitive" if lowering.attention == "primitive" else "standard"
    encoder = load_encoder(
        model,
        weight_dtype=TORCH_DTYPES[lowering.dtype],
        compute_dtype=dtype,
        form=form or own,
    )
    found: Tensors = {}
    for case in cases:
        values = [torch.from_numpy(case.inputs[name]) for name in model.shape.input.names]
        if values[0].is_floating_point():
            # As the graph reads them.
            values[0] = values[0].to(TORCH_DTYPES[lowering.dtype]).to(dtype)
        with torch.inference_mode():
            output = encoder(*values)
        states = {f"hidden.{i}": state for i, state in enumerate(output.hidden)}
        for name, tensor in {**states, model.shape.output: output.output}.items():
            found[f"{case.name}.{name}"] = case.kept(tensor.float().numpy())
    return found
