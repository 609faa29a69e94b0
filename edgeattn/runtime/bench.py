"""`bench`: how fast a bundle is on this machine, and what this machine is.

Prefill and decode are timed apart, as `generate` runs them: the prompt in the same pieces, the
choice of the next token included, text left out. No token ends the continuation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgeattn import __version__
from edgeattn.bundle.bundle import MANIFEST, Bundle, hash_file
from edgeattn.devices.libcuda import GpuFacts, read_driver
from edgeattn.devices.probe import Probe, matching_device, probe
from edgeattn.devices.registry import parse_target
from edgeattn.devices.sensors import peak_memory, processor_name, read_sensors
from edgeattn.encoder_shape import TokenInput
from edgeattn.errors import RuntimeInputError, UsageError
from edgeattn.runtime.backend import (
    BackendName,
    BackendOptions,
    open_backend,
    open_encoder_backend,
)
from edgeattn.runtime.bench_record import (
    SCHEMA_VERSION,
    BenchRecord,
    BundleFacts,
    Machine,
    Moment,
    Phase,
    Quantity,
    Setup,
)
from edgeattn.runtime.encoder import EncoderSession
from edgeattn.runtime.generate import PREFILL_PIECE
from edgeattn.runtime.session import Session, State

Progress = Callable[[str, int, int], None]

CPU = "cpu"
# Of a bundle whose context holds them; else a quarter of it is for new tokens, the rest for prompt.
_TOKENS = 128
_NEW_TOKENS = 64


@dataclass(frozen=True)
class Amount:
    """How much is measured.

    Attributes:
        tokens: of a prompt or text; None takes 128, or what the context holds.
        new_tokens: decode steps; None takes 64, or a quarter of the context; of no use to encoders.
        rows: texts or images that pass an encoder together.
        repeats: timed passes.
        warmup: passes before them, which are not timed.
    """

    tokens: int | None = None
    new_tokens: int | None = None
    rows: int = 1
    repeats: int = 5
    warmup: int = 1


def bench(
    bundle: Path | str,
    amount: Amount | None = None,
    *,
    backend: BackendName = "onnxruntime",
    provider: str = CPU,
    threads: int | None = None,
    exact: bool = False,
    engine: Path | str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> BenchRecord:
    """Measures a bundle on this machine.

    Args:
        bundle: its directory, of a decoder or an encoder.
        amount: how much is measured.
        backend: see `edgeattn.runtime.Session.open`, as for the next four.
        provider: of ONNX Runtime.
        threads: of one operator.
        exact: multiply int4 weights in fp32.
        engine: of TensorRT.
        device: what the figures shall be labelled with; None takes what this machine is.
        progress: called with (stage, done, total).

    Raises:
        UsageError: an unknown name, or a number below 1.
        RuntimeInputError: this machine is not `device`, or the tokens exceed the context.
        BundleError: no bundle, a damaged one, or one that does not load; or no engine.
        LoweringError: the engine was made for another GPU, processor or TensorRT.
        MissingDependencyError: onnxruntime is not installed, or has no such provider; or no GPU.
    """
    amount = amount or Amount()
    _check_amount(amount)
    options = BackendOptions(backend, provider, threads, exact, engine)
    named = None if engine is None else Path(engine).name
    setup = Setup(backend=backend, provider=provider, threads=threads, exact=exact, engine=named)
    found = probe()  # before anything is loaded
    machine = this_machine(found, on_cpu=setup.on_cpu, wanted=device)
    opened = Bundle.open(bundle)
    run = _passes_of(opened, options, amount, on_gpu=not setup.on_cpu)
    tell = progress or (lambda stage, done, total: None)
    for done in range(amount.warmup):
        tell("warm-up", done, amount.warmup)
        run.once()
    before = _moment()
    for done in range(amount.repeats):
        tell("measuring", done, amount.repeats)
        run.once(keep=True)
    after = _moment()  # at once, before the machine rests
    tell("measuring", amount.repeats, amount.repeats)
    return BenchRecord(
        schema_version=SCHEMA_VERSION,
        edgeattn=__version__,
        bundle=_facts(opened),
        machine=machine,
        setup=setup,
        quantity=run.quantity,
        warmup=amount.warmup,
        phases=run.phases(),
        cache_bytes=run.cache_bytes,
        peak_memory_bytes=peak_memory(),
        gpu_memory_bytes=_taken(found.gpu, run.gpu),
        before=before,
        after=after,
    )


def _taken(before: GpuFacts | None, after: GpuFacts | None) -> int | None:
    """What this process, above all, took of the GPU's free memory."""
    if before is None or after is None:
        return None
    return max(before.free_bytes - after.free_bytes, 0)


def this_machine(found: Probe, *, on_cpu: bool, wanted: str | None = None) -> Machine:
    """The machine that figures are of.

    Args:
        found: its facts.
        on_cpu: whether its processor runs the model; such figures are never a GPU card's.
        wanted: what it shall be called; None for what it is.

    Raises:
        UsageError: `wanted` is the name of no device.
        RuntimeInputError: it is another device than `wanted`.
    """
    match = matching_device(found)
    name = match.name if match is not None else None
    if on_cpu and (match is None or match.kind != "jetson"):
        name = CPU
    if wanted is not None and parse_target(wanted).device.name != name:
        raise RuntimeInputError(
            expected=f"to run on {wanted}, for figures with that label",
            came=f"the model runs on {name or 'a device that edgeattn does not know'} here",
            todo="run `edgeattn bench` there, or leave out --device",
        )
    return Machine(
        device=name,
        processor=processor_name(),
        arch=found.arch,
        board=found.board,
        gpu=found.gpu.name if found.gpu else None,
        driver=found.driver,
        l4t=found.l4t,
        power_mode=found.power_mode,
        onnxruntime=found.onnxruntime or found.onnxruntime_gpu,
    )


def phase(
    name: Literal["prefill", "decode", "encode"],
    unit: Literal["tokens", "texts", "images"],
    count: int,
    seconds: Sequence[float],
) -> Phase:
    """Median and 90th percentile of samples.

    Args:
        name: what was timed.
        unit: what its speed counts.
        count: of these in one sample.
        seconds: the samples, at least one.
    """
    one = len(seconds) == 1
    tenths = [seconds[0]] * 9 if one else statistics.quantiles(seconds, n=10, method="inclusive")
    return Phase(
        name=name,
        unit=unit,
        count=count,
        samples=len(seconds),
        median_seconds=statistics.median(seconds),
        p90_seconds=tenths[-1],
    )


class _DecoderPasses:
    """A prompt that is continued again and again."""

    def __init__(self, session: Session, amount: Amount, *, on_gpu: bool) -> None:
        self._session, self._on_gpu = session, on_gpu
        self.gpu: GpuFacts | None = None  # while the cache was still there
        new = amount.new_tokens or min(_NEW_TOKENS, max(1, session.context // 4))
        tokens = amount.tokens or max(1, min(_TOKENS, session.context - new))
        _check_context(tokens + new, session.context)
        self._prompt = np.random.default_rng(0).integers(session.vocab_size, size=(1, tokens))
        self._prefill: list[float] = []
        self._decode: list[float] = []
        self.quantity = Quantity(kind="decoder", rows=1, tokens=tokens, new_tokens=new)
        self.cache_bytes: int | None = None

    def once(self, *, keep: bool = False) -> None:
        """Reads the prompt, continues it, and keeps the times if told so."""
        began = time.perf_counter()
        state: State | None = None
        for first in range(0, self.quantity.tokens, PREFILL_PIECE):
            token, state = self._step(self._prompt[:, first : first + PREFILL_PIECE], state)
        seconds = [time.perf_counter() - began]
        for _ in range(self.quantity.new_tokens):
            began = time.perf_counter()
            token, state = self._step(np.array([[token]]), state)
            seconds.append(time.perf_counter() - began)
        if keep and state is not None:
            self._prefill.append(seconds[0])
            self._decode.extend(seconds[1:])
            self.cache_bytes = self._session.cache_bytes(state)
            self.gpu = read_driver().gpu if self._on_gpu else None

    def _step(self, ids: np.typing.NDArray[np.int64], state: State | None) -> tuple[int, State]:
        step = self._session.run(ids, state)
        return int(step.likeliest[0, -1]), step.state

    def phases(self) -> tuple[Phase, ...]:
        """What was kept."""
        return (
            phase("prefill", "tokens", self.quantity.tokens, self._prefill),
            phase("decode", "tokens", 1, self._decode),
        )


class _EncoderPasses:
    """Texts or images that are encoded again and again."""

    cache_bytes = None

    def __init__(self, session: EncoderSession, amount: Amount, *, on_gpu: bool) -> None:
        self._session, self._seconds, self._on_gpu = session, list[float](), on_gpu
        self.gpu: GpuFacts | None = None
        read, rng, rows = session.shape.input, np.random.default_rng(0), amount.rows
        self._is_text = isinstance(read, TokenInput)
        tokens = session.context
        self._given: np.typing.NDArray[np.int64 | np.float64]
        if isinstance(read, TokenInput):
            tokens = amount.tokens or min(_TOKENS, session.context)
            _check_context(tokens, session.context)
            self._given = rng.integers(read.vocab_size, size=(rows, tokens))
        elif amount.tokens not in (None, tokens):
            raise UsageError(
                expected=f"images of {tokens} tokens, as the bundle reads them",
                came=f"{amount.tokens} are asked for",
                todo="leave out --tokens",
            )
        else:
            self._given = rng.standard_normal((rows, read.channels, read.height, read.width))
        kind: Literal["text encoder", "image encoder"] = (
            "text encoder" if self._is_text else "image encoder"
        )
        self.quantity = Quantity(kind=kind, rows=rows, tokens=tokens, new_tokens=0)

    def once(self, *, keep: bool = False) -> None:
        """Encodes the rows, and keeps the time if told so."""
        run = self._session.run if self._is_text else self._session.run_images
        began = time.perf_counter()
        run(self._given)
        seconds = time.perf_counter() - began
        if keep:
            self._seconds.append(seconds)
            self.gpu = read_driver().gpu if self._on_gpu else None

    def phases(self) -> tuple[Phase, ...]:
        """What was kept."""
        unit: Literal["texts", "images"] = "texts" if self._is_text else "images"
        return (phase("encode", unit, self.quantity.rows, self._seconds),)


def _passes_of(
    bundle: Bundle, options: BackendOptions, amount: Amount, *, on_gpu: bool
) -> _DecoderPasses | _EncoderPasses:
    if bundle.is_encoder:
        if amount.new_tokens is not None:
            raise UsageError(
                expected="a decoder, to measure new tokens",
                came=f"{bundle.path} holds an encoder",
                todo="leave out --new-tokens",
            )
        encoder = EncoderSession(bundle, open_encoder_backend(bundle, options))
        return _EncoderPasses(encoder, amount, on_gpu=on_gpu)
    if amount.rows != 1:
        raise UsageError(
            expected="one row for a decoder, as `generate` runs it",
            came=f"{amount.rows} are asked for",
            todo="leave out --rows",
        )
    session = Session(bundle, open_backend(bundle, options))
    return _DecoderPasses(session, amount, on_gpu=on_gpu)


def _check_amount(amount: Amount) -> None:
    for name, value in asdict(amount).items():
        least = 0 if name == "warmup" else 1
        if value is not None and value < least:
            raise UsageError(
                expected=f"--{name.replace('_', '-')} of at least {least}",
                came=f"it is {value}",
                todo="give more",
            )


def _check_context(tokens: int, context: int) -> None:
    if tokens > context:
        raise RuntimeInputError(
            expected=f"at most {context} tokens, the context of the bundle",
            came=f"{tokens} are asked for, new ones included",
            todo="measure fewer, or export with a larger --context",
        )


def _moment() -> Moment:
    return Moment(**asdict(read_sensors()))


def _facts(bundle: Bundle) -> BundleFacts:
    return BundleFacts(
        name=bundle.path.resolve().name,
        target=bundle.manifest.target.name,
        quant=str(bundle.manifest.recipe.get("quant")),
        manifest_sha256=hash_file(bundle.path / MANIFEST),
    )
