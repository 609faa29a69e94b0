"""The proof of a bundle: torch against ONNX Runtime at export, golden vectors against it later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.encoder_shape import AnyShape, EncoderShape
from edgeattn.engine.build import BuildReport, check_build
from edgeattn.engine.profiles import check_profile, encoder_check_profile, input_shapes
from edgeattn.errors import ProofError
from edgeattn.planner.lowering import Lowering
from edgeattn.shape import ModelShape
from edgeattn.verify.cases import MANY_RAGGED_STEPS, RAGGED_STEPS, build_cases
from edgeattn.verify.compare import (
    KL,
    Agreement,
    compare_and_locate,
    distribution_agreement,
    locate,
)
from edgeattn.verify.drive import Tensors, drive
from edgeattn.verify.failures import disagreement_error, overflow_error
from edgeattn.verify.golden import Golden
from edgeattn.verify.measure import errors
from edgeattn.verify.operators import sample_operators, with_operators
from edgeattn.verify.ort_backend import OrtBackend
from edgeattn.verify.tolerance import plain_dtypes, plain_runs

if TYPE_CHECKING:
    from edgeattn.models.model import Model

Progress = Callable[[str, int, int], None]

TENSORRT_TIMEOUT_S = 1800.0
# Lengths of the optimisation profile the check builds with, when the recipe names no context.
_CHECK_CONTEXT = 2048


@dataclass(frozen=True)
class Verification:
    """Everything a proof found.

    Attributes:
        agreements: one per implementation compared with the reference.
        tensorrt: outcome of the TensorRT-RTX check, None where TensorRT has no part.
        left_out: cases that were not run, each with the reason.
    """

    agreements: tuple[Agreement, ...]
    tensorrt: BuildReport | None
    left_out: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all implementations agree and TensorRT, where it was asked, did not refuse."""
        refused = self.tensorrt is not None and self.tensorrt.status == "refused"
        return all(a.passed for a in self.agreements) and not refused

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "passed": self.passed,
            "agreements": [a.to_dict() for a in self.agreements],
            "tensorrt": self.tensorrt.to_dict() if self.tensorrt else None,
            "left_out": list(self.left_out),
        }

    def raise_if_failed(self) -> None:
        """Turns a failed proof into an error that names the first bad layer.

        Raises:
            ProofError: some implementation disagrees, or TensorRT refused the graph.
        """
        for agreement in self.agreements:
            if not agreement.passed:
                raise disagreement_error(agreement, self.to_dict())
        if self.tensorrt is not None and self.tensorrt.status == "refused":
            raise ProofError(
                expected=f"TensorRT-RTX to build the graph for SM{self.tensorrt.sms[0]}",
                came=f"it refused: {self.tensorrt.reason}",
                todo="report this graph, or export for another target or scheme",
                details=self.to_dict(),
            )


def record_golden(
    model: Model,
    lowering: Lowering,
    *,
    tokens: Sequence[int] | None,
    progress: Progress | None = None,
) -> Golden:
    """Runs the torch model of the recipe: the reference, and plain low precision beside it.

    Args:
        model: transformed and quantised as the recipe says.
        lowering: dtype, spelling and choice of logits.
        tokens: ids of a text to run, None for random ones.
        progress: called with (stage, done, total).

    Raises:
        ProofError: the model overflows the bundle's dtype, so that nothing could be compared.
    """
    from edgeattn.verify.reference import run_reference

    shape = model.shape
    cases = build_cases(
        shape.vocab_size,
        shape.max_context,
        tokens,
        exact=shape.exact_keys,
        ragged_steps=MANY_RAGGED_STEPS if shape.has_variants else RAGGED_STEPS,
    )
    stage = staged(progress, "torch, layer by layer")
    overflow = ""
    for dtype in plain_dtypes(lowering):
        expected, runs = run_reference(model, lowering, cases, plain_runs(lowering, dtype), stage)
        rounds = lowering.decides_at_run_time
        found = [errors(run, expected, cases, rounds=rounds) for run in runs]
        largest = {name: max(run[name] for run in found) for name in found[0]}
        overflow = next((n for n, error in largest.items() if not math.isfinite(error)), "")
        if not overflow:
            largest[KL] = max(distribution_agreement(run, expected)[1] for run in runs)
            return Golden(cases, expected, largest)
    raise overflow_error(lowering.dtype, overflow)


def prove(
    model: Model,
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
        model: transformed and quantised as the recipe says.
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
    from edgeattn.verify.amplified import excuse_amplified, may_amplify

    golden = record_golden(model, lowering, tokens=tokens, progress=progress)
    golden.save(golden_file)
    agreement = check_onnxruntime(
        model_file, golden, lowering, num_layers=model.shape.num_layers, progress=progress
    )
    if not agreement.passed and may_amplify(model, lowering):
        stage = staged(progress, "ONNX Runtime, each layer alone")
        agreement, golden = excuse_amplified(agreement, model, lowering, model_file, golden, stage)
        golden.save(golden_file)
    if lowering.decides_at_run_time:
        agreement = add_layers(agreement, model, lowering, model_file, golden, progress=progress)
    samples = partial(sample_operators, model_file, lowering, golden.cases[0])
    agreement = with_operators(agreement, samples, operators_file)
    verification = with_tensorrt(
        agreement, model_file, lowering, model.shape, plugin_library, progress
    )
    verification.raise_if_failed()
    return verification


def check(
    model_file: Path,
    golden: Golden,
    lowering: Lowering,
    shape: ModelShape,
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
        shape: of the model.
        tensorrt: whether to ask TensorRT-RTX, where the target has a TensorRT.
        provider: of ONNX Runtime: "cpu", "cuda" or "tensorrt".
        plugin_library: that TensorRT-RTX loads here; None for the function bodies.
        progress: called with (stage, done, total).
    """
    agreement = check_onnxruntime(
        model_file,
        golden,
        lowering,
        num_layers=shape.num_layers,
        provider=provider,
        progress=progress,
    )
    if not tensorrt:
        return Verification((agreement,), None)
    return with_tensorrt(agreement, model_file, lowering, shape, plugin_library, progress)


def check_onnxruntime(
    model_file: Path,
    golden: Golden,
    lowering: Lowering,
    *,
    num_layers: int,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> Agreement:
    """Compares the bundle's own file in ONNX Runtime with golden vectors.

    Only when something disagrees is the graph run again with the residual stream as outputs, to
    name the first bad layer.
    """

    def run(hidden: bool) -> tuple[str, Tensors]:
        stage = staged(progress, "ONNX Runtime, layer by layer" if hidden else "ONNX Runtime")
        backend = OrtBackend(model_file, lowering, hidden=hidden, provider=provider)
        return backend.name, drive(backend, golden.cases, stage)

    return compare_and_locate(run, golden, lowering, num_layers)


def add_layers(
    agreement: Agreement,
    model: Model,
    lowering: Lowering,
    model_file: Path,
    golden: Golden,
    *,
    progress: Progress | None = None,
) -> Agreement:
    """Adds to an agreement how each layer of the graph does on its own (`layers`).

    Args:
        agreement: of the whole network.
        model: transformed and quantised as the recipe says.
        lowering: what was decided.
        model_file: the graph, its weights beside it.
        golden: for its inputs.
        progress: called with (stage, done, total).
    """
    from edgeattn.verify.layers import compare_layers

    stage = staged(progress, "ONNX Runtime, each layer alone")
    rows = compare_layers(
        model, lowering, OrtBackend(model_file, lowering, hidden=True), golden.cases, stage
    )
    comparisons, first_bad = (*agreement.comparisons, *rows), agreement.first_bad
    if not all(row.passed for row in rows):
        first_bad = locate(comparisons, model.shape.num_layers)
    return replace(agreement, comparisons=comparisons, first_bad=first_bad)


def with_tensorrt(
    agreement: Agreement,
    model_file: Path,
    lowering: Lowering,
    shape: AnyShape,
    plugin_library: Path | None,
    progress: Progress | None,
) -> Verification:
    """Adds TensorRT's verdict to an agreement, where there is one to ask for."""
    built = None
    if agreement.passed:
        built = check_tensorrt(
            model_file, lowering, shape, plugin_library=plugin_library, progress=progress
        )
    return Verification((agreement,), built)


def check_tensorrt(
    model_file: Path,
    lowering: Lowering,
    shape: AnyShape,
    *,
    plugin_library: Path | None = None,
    progress: Progress | None = None,
) -> BuildReport | None:
    """Parses and builds the graph with TensorRT-RTX, None where TensorRT has no part."""
    if lowering.rtx_sm is None:
        return None
    if progress:
        progress(f"TensorRT-RTX, parse and build for SM{lowering.rtx_sm}", 0, 1)
    context = lowering.context or min(shape.max_context, _CHECK_CONTEXT)
    of_kind = encoder_check_profile if isinstance(shape, EncoderShape) else check_profile
    report = check_build(
        model_file,
        sm=lowering.rtx_sm,
        profiles=input_shapes(model_file, of_kind(context, lowering.batch)),
        timeout_s=TENSORRT_TIMEOUT_S,
        plugin_library=plugin_library,
        strip_functions=lowering.strip_functions and plugin_library is not None,
    )
    if progress:
        progress(f"TensorRT-RTX, parse and build for SM{lowering.rtx_sm}", 1, 1)
    return report


def staged(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """What tells of one stage; None where nobody asks."""
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)
