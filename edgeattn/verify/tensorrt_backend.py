"""A bundle's engine on golden vectors, run by TensorRT on this machine's GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeattn import errors
from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.child_process import Outcome, PhaseProgress, run_child
from edgeattn.engine.execution import DeviceCache, EngineRunner
from edgeattn.engine.flavours import FLAVOURS
from edgeattn.engine.profiles import BATCH, LENGTH, PAST
from edgeattn.engine.record import Engine
from edgeattn.errors import EdgeattnError, LoweringError, ProofError
from edgeattn.planner.lowering import Lowering
from edgeattn.verify.cases import Case, StepInputs
from edgeattn.verify.compare import Agreement, compare
from edgeattn.verify.drive import Tensors
from edgeattn.verify.encoder_golden import EncoderCase, EncoderGolden
from edgeattn.verify.golden import Golden

CHILD_MODULE = "edgeattn.verify.tensorrt_child"
_TIMEOUT_S = 1800.0


AnyGolden = Golden | EncoderGolden


class TensorRtBackend:
    """An engine as `drive` takes it; caches stay on the GPU until they are compared.

    Args:
        runner: of the engine.
        packed_cache: see `edgeattn.verify.drive.Backend`.
    """

    def __init__(self, runner: EngineRunner, *, packed_cache: bool) -> None:
        self.name = runner.title
        self.packed_cache = packed_cache
        self._runner = runner

    def step(self, inputs: StepInputs, past: Mapping[str, object] | None) -> Mapping[str, object]:
        """See `edgeattn.verify.drive.Backend.step`."""
        before = None if past is None else past["cache"]
        assert before is None or isinstance(before, DeviceCache)
        logits, cache = self._runner.run(
            inputs.input_ids, inputs.attention_mask, inputs.position_ids, before
        )
        present = {name: (cache, name) for name in self._runner.cache_names}
        return {"logits": logits, "cache": cache, **present}

    def to_numpy(self, value: object) -> NDArray[np.float32]:
        """See `edgeattn.verify.drive.Backend.to_numpy`."""
        if isinstance(value, np.ndarray):
            return value
        assert isinstance(value, tuple)
        return self._runner.read(*value)


@dataclass(frozen=True)
class EngineAgreement:
    """How an engine does on golden vectors.

    Attributes:
        agreement: of what was run.
        left_out: cases the engine was not built for, each with the reason.
    """

    agreement: Agreement
    left_out: tuple[str, ...]


def check_engine(
    engine: Engine,
    bundle: Bundle,
    golden: AnyGolden,
    *,
    gpu: str,
    progress: PhaseProgress | None = None,
) -> EngineAgreement:
    """Runs an engine in a child process and compares what it gives.

    A process of its own, because TensorRT may crash on an engine that was never run before, and
    needs to be found by the loader before Python starts.

    Args:
        engine: that `require_runs_here` accepts.
        bundle: it belongs to.
        golden: what it must reproduce; the bounds are ONNX Runtime's.
        gpu: name of the GPU, for the report.
        progress: called with (stage, done, total).

    Raises:
        LoweringError: it was built for none of the sizes of the golden vectors.
        ProofError: TensorRT crashed.
        EdgeattnError: what `LoadedEngine` refuses.
    """
    golden, left_out = cases_for(engine, golden)
    if not golden.cases:
        raise LoweringError(
            expected=f"golden vectors of sizes that {engine.path.name} was built for",
            came=f"there are none ({left_out[0]})",
            todo="build it with other sizes: edgeattn build --profile",
        )
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    found, title = _run(engine, bundle, golden, progress)
    name = f"{title} on {gpu}, engine {engine.path.name}"
    return EngineAgreement(compare(name, found, golden, lowering), left_out)


def cases_for(engine: Engine, golden: AnyGolden) -> tuple[AnyGolden, tuple[str, ...]]:
    """The golden vectors of sizes that an engine was built for, and what is left out and why."""
    reasons = {case.name: _outside(case, engine) for case in golden.cases}
    left_out = tuple(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    return golden.only([name for name, reason in reasons.items() if not reason]), left_out


def _outside(case: Case | EncoderCase, engine: Engine) -> str:
    """Why an engine cannot run a case, empty where it can."""
    steps = [_encoder_sizes(case)] if isinstance(case, EncoderCase) else map(_sizes, case.steps)
    for sizes in steps:
        if not any(_holds(profile, sizes) for profile in engine.record.profiles.values()):
            told = f"{sizes[BATCH]} rows" if LENGTH not in sizes else _told(sizes)
            return f"no optimisation profile holds its {told}"
    return ""


def _sizes(step: StepInputs) -> dict[str, int]:
    rows, length = step.input_ids.shape
    return {BATCH: rows, LENGTH: length, PAST: step.attention_mask.shape[1] - length}


def _encoder_sizes(case: EncoderCase) -> dict[str, int]:
    """Of images, whose tokens are as many as they are, the rows alone."""
    if (mask := case.valid) is not None:
        return {BATCH: mask.shape[0], LENGTH: mask.shape[1]}
    return {BATCH: len(next(iter(case.inputs.values())))}


def _told(sizes: Mapping[str, int]) -> str:
    past = f" after {sizes[PAST]}" if PAST in sizes else ""
    return f"{sizes[BATCH]} x {sizes[LENGTH]} tokens{past}"


def _holds(profile: Mapping[str, str], sizes: Mapping[str, int]) -> bool:
    """Whether sizes lie in a profile, min:opt:max by dimension."""
    for name, size in sizes.items():
        low, _, high = map(int, profile[name].split(":"))
        if not low <= size <= high:
            return False
    return True


def _run(
    engine: Engine, bundle: Bundle, golden: AnyGolden, progress: PhaseProgress | None
) -> tuple[Tensors, str]:
    """What an engine gives for the cases of golden vectors, and what ran it."""
    with tempfile.TemporaryDirectory(prefix="edgeattn-run-") as folder:
        inputs, outputs = Path(folder) / "golden.npz", Path(folder) / "outputs.npz"
        golden.save(inputs)
        request = {
            "bundle": str(bundle.path.resolve()),
            "engine": str(engine.path.resolve()),
            "golden": str(inputs),
            "outputs": str(outputs),
        }
        outcome = run_child(
            FLAVOURS[engine.record.flavour],
            request,
            timeout_s=_TIMEOUT_S,
            module=CHILD_MODULE,
            progress=progress,
        )
        _raise_if_refused(outcome, engine)
        with np.load(outputs, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}, outcome.facts["title"]


def _raise_if_refused(outcome: Outcome, engine: Engine) -> None:
    refusal: Mapping[str, Any] | None = outcome.facts.get("refusal")
    if refusal is not None:
        kind = getattr(errors, refusal["kind"], EdgeattnError)
        raise kind(**{part: refusal[part] for part in ("expected", "came", "todo")})
    if outcome.exit_detail:
        raise ProofError(
            expected=f"TensorRT to run {engine.path.name}",
            came=f"its process stopped while {outcome.facts['stage']}: {outcome.exit_detail}",
            todo="build the engine again here with edgeattn build --force; else report it",
            details={"stderr": outcome.stderr[-4000:]},
        )
