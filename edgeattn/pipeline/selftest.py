"""The first run of an engine on its device: golden vectors compared, the outcome kept beside it."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone

from pydantic import BaseModel, ConfigDict, ValidationError

from edgeattn.bundle.bundle import GOLDEN, GOLDEN_ENCODER, Bundle
from edgeattn.bundle.whole_file import write_text
from edgeattn.devices.probe import Probe
from edgeattn.engine.record import Engine, require_runs_here
from edgeattn.errors import BundleError, ProofError
from edgeattn.pipeline.clock import Progress
from edgeattn.verify.compare import Agreement
from edgeattn.verify.encoder_golden import EncoderGolden
from edgeattn.verify.failures import disagreement_error
from edgeattn.verify.golden import Golden
from edgeattn.verify.tensorrt_backend import AnyGolden, EngineAgreement, cases_for, check_engine

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class GroupError(_Record):
    """The tensor of a kind that is nearest to its bound.

    Attributes:
        tensor: its name.
        error: relative; None where it is not finite.
        allowed: the bound.
    """

    tensor: str
    error: float | None
    allowed: float


class SelfTest(_Record):
    """Outcome of an engine's first run on a GPU.

    Attributes:
        schema_version: of this record.
        passed: whether every tensor was within its bound.
        came: what was wrong, in a clause; empty where nothing was.
        errors: worst tensor by kind ("sequence decode logits").
        left_out: cases it was not built for.
        engine_sha256: of the engine.
        gpu: name.
        driver: CUDA version of the driver.
        backend: what ran it.
        date: UTC.
    """

    schema_version: int
    passed: bool
    came: str
    errors: dict[str, GroupError]
    left_out: tuple[str, ...]
    engine_sha256: str
    gpu: str
    driver: str | None
    backend: str
    date: str

    @property
    def told(self) -> str:
        """One clause for people."""
        run = f"{len(self.errors)} kinds of tensors within their bounds"
        missing = f", {len(self.left_out)} cases left out" if self.left_out else ""
        return f"{run}{missing}" if self.passed else self.came


def self_test(
    engine: Engine, bundle: Bundle, found: Probe, progress: Progress | None = None
) -> SelfTest | None:
    """Vouches for an engine on this machine: by what is stored, or else by running it.

    The same engine is run once per GPU and driver.

    Args:
        engine: of the bundle.
        bundle: it belongs to.
        found: this machine.
        progress: called with (stage, done, total).

    Returns:
        The outcome; None for a bundle without golden vectors of sizes that the engine takes.

    Raises:
        ProofError: it gave wrong numbers, now or when it was run before.
        EdgeattnError: it does not run here.
    """
    stored = _stored(engine, found)
    if stored is None:
        golden = _golden_of(bundle)
        if golden is None or not cases_for(engine, golden)[0].cases:
            return None
        stored, _ = run_and_store(engine, bundle, golden, found, progress)
    if not stored.passed:
        raise ProofError(
            expected=f"{engine.path.name} to pass its self-test on {stored.gpu}",
            came=f"on {stored.date[:10]} {stored.came}",
            todo="build it again with edgeattn build --force; else report it",
            details=stored.model_dump(mode="json"),
        )
    return stored


def run_and_store(
    engine: Engine,
    bundle: Bundle,
    golden: AnyGolden,
    found: Probe,
    progress: Progress | None = None,
) -> tuple[SelfTest, EngineAgreement]:
    """Runs an engine on golden vectors, whatever is stored, and stores the outcome.

    Args:
        engine: of the bundle.
        bundle: it belongs to.
        golden: what it must reproduce.
        found: this machine.
        progress: called with (stage, done, total).

    Raises:
        EdgeattnError: it does not run here.
    """
    require_runs_here(engine, bundle, found)
    assert found.gpu is not None
    checked = check_engine(engine, bundle, golden, gpu=found.gpu.name, progress=progress)
    agreement = checked.agreement
    outcome = SelfTest(
        schema_version=SCHEMA_VERSION,
        passed=agreement.passed,
        came="" if agreement.passed else disagreement_error(agreement, {}).came,
        errors=_errors(agreement),
        left_out=checked.left_out,
        engine_sha256=engine.record.sha256,
        gpu=found.gpu.name,
        driver=found.driver,
        backend=agreement.backend,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    _store(engine, outcome)
    return outcome, checked


def _golden_of(bundle: Bundle) -> AnyGolden | None:
    file = bundle.file(GOLDEN_ENCODER if bundle.is_encoder else GOLDEN)
    if file is None:
        return None
    return EncoderGolden.load(file) if bundle.is_encoder else Golden.load(file)


def _errors(agreement: Agreement) -> dict[str, GroupError]:
    return {
        group: GroupError(
            tensor=worst.tensor,
            error=worst.error if worst.error < float("inf") else None,
            allowed=worst.allowed,
        )
        for group, worst in agreement.worst_per_group().items()
    }


def _store(engine: Engine, outcome: SelfTest) -> None:
    # in a bundle that cannot be written it is run again next time
    with contextlib.suppress(BundleError):
        write_text(engine.selftest_file, outcome.model_dump_json(indent=2) + "\n")


def _stored(engine: Engine, found: Probe) -> SelfTest | None:
    """What an earlier run of this very engine on this GPU and driver found."""
    try:
        stored = SelfTest.model_validate_json(engine.selftest_file.read_bytes())
    except (OSError, ValidationError):
        return None  # none, or by another edgeattn: it is run again
    here = (engine.record.sha256, found.gpu.name if found.gpu else "", found.driver)
    same = (stored.engine_sha256, stored.gpu, stored.driver) == here
    return stored if same and stored.schema_version == SCHEMA_VERSION else None
