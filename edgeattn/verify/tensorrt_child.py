"""The child process that runs an engine on golden vectors and leaves its outputs in a file.

Run as `python -m edgeattn.verify.tensorrt_child` with the request as JSON on standard input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.child_report import Result, die_with_parent, tell
from edgeattn.engine.encoder_execution import EncoderRunner
from edgeattn.engine.execution import EngineRunner
from edgeattn.engine.record import read_engine
from edgeattn.errors import EdgeattnError
from edgeattn.planner.lowering import Lowering
from edgeattn.verify.drive import Tensors, drive
from edgeattn.verify.encoder_golden import EncoderGolden, run_cases
from edgeattn.verify.golden import Golden
from edgeattn.verify.tensorrt_backend import TensorRtBackend


def _work(request: Mapping[str, Any], result: Result) -> None:
    # the parent has checked the bundle and the engine
    bundle = Bundle.open(request["bundle"], check_hashes=False)
    result.write(stage="loading the engine")
    engine, golden = read_engine(Path(request["engine"])), Path(request["golden"])
    runner = EncoderRunner(engine, bundle) if bundle.is_encoder else EngineRunner(engine, bundle)
    result.write(stage="running the engine", title=runner.title)
    np.savez(request["outputs"], **_run(runner, bundle, golden))  # type: ignore[arg-type]


def _run(runner: EncoderRunner | EngineRunner, bundle: Bundle, golden: Path) -> Tensors:
    def told(done: int, of: int) -> None:
        tell(runner.title, done, of)

    if isinstance(runner, EncoderRunner):
        return run_cases(runner.run, EncoderGolden.load(golden).cases, told)
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    backend = TensorRtBackend(runner, packed_cache=lowering.packs_cache)
    return drive(backend, Golden.load(golden).cases, told)


def main() -> None:
    """Reads the request, runs the engine, leaves outputs or a refusal."""
    die_with_parent()
    request = json.load(sys.stdin)
    result = Result(Path(request["result"]))
    try:
        _work(request, result)
        result.write(stage="done")
    except EdgeattnError as error:
        told = {part: getattr(error, part) for part in ("expected", "came", "todo")}
        result.write(refusal={"kind": type(error).__name__, **told})
    # the libraries' own tear-down has nothing to add and could only spoil the exit code
    os._exit(0)


if __name__ == "__main__":
    main()
