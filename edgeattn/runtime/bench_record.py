"""What a benchmark measured, of what and where, as a JSON file; and two of them compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgeattn.bundle.whole_file import write_text
from edgeattn.errors import RuntimeInputError
from edgeattn.runtime.backend import BackendName

SCHEMA_VERSION: Literal[1] = 1
# A record is some kilobytes; whatever is larger is something else.
_MOST_BYTES = 1 << 20


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class BundleFacts(_Record):
    """Which bundle was measured.

    Attributes:
        name: of its folder.
        target: NAME@SOFTWARE it was exported for.
        quant: scheme of its weights.
        manifest_sha256: of its manifest, which has the hashes of all its files.
    """

    name: str
    target: str
    quant: str
    manifest_sha256: str


class Machine(_Record):
    """Where it was measured; None for what the machine does not say.

    Attributes:
        device: name among `edgeattn targets` of what ran the model; "cpu" for any processor that is
            not a Jetson's.
        processor: what it calls itself.
        arch: of the processor.
        board: what a Jetson calls itself.
        gpu: name of the first GPU, whether it took part or not.
        driver: CUDA version it supports.
        l4t: Jetson Linux.
        power_mode: of a Jetson.
        onnxruntime: version.
    """

    device: str | None
    processor: str | None
    arch: str
    board: str | None
    gpu: str | None
    driver: str | None
    l4t: str | None
    power_mode: str | None
    onnxruntime: str | None


class Setup(_Record):
    """How the bundle was run; see `edgeattn.runtime.Session.open`."""

    backend: BackendName
    provider: str
    threads: int | None
    exact: bool
    engine: str | None

    @property
    def on_cpu(self) -> bool:
        """Whether a processor ran it."""
        return self.backend == "onnxruntime" and self.provider == "cpu"


class Quantity(_Record):
    """What was measured: records are comparable where this is the same.

    Attributes:
        kind: of the model.
        rows: prompts, texts or images that pass it together.
        tokens: of each prompt or text; of an image with its class token.
        new_tokens: of the continuation; 0 for an encoder.
    """

    kind: Literal["decoder", "text encoder", "image encoder"]
    rows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=0)

    def __str__(self) -> str:
        new = f" + {self.new_tokens} new" if self.new_tokens else ""
        return f"{self.kind}, {self.rows} x {self.tokens}{new} tokens"


class Phase(_Record):
    """One timed thing.

    Attributes:
        name: reading a prompt, choosing a further token, or encoding.
        unit: what a speed counts.
        count: of these in one sample.
        samples: how often it was timed, warm-up left out.
        median_seconds: of the samples.
        p90_seconds: nine tenths of the samples took at most this, interpolated linearly.
    """

    name: Literal["prefill", "decode", "encode"]
    unit: Literal["tokens", "texts", "images"]
    count: int = Field(ge=1)
    samples: int = Field(ge=1)
    median_seconds: float = Field(gt=0)
    p90_seconds: float = Field(gt=0)

    @property
    def per_second(self) -> float:
        """Units a second, of the median."""
        return self.count / self.median_seconds


class Moment(_Record):
    """The machine at one moment, see `edgeattn.devices.sensors.Reading`."""

    clocks_mhz: dict[str, float]
    temperatures_c: dict[str, float]
    gpu_watts: float | None


class BenchRecord(_Record):
    """A benchmark.

    Attributes:
        schema_version: of this record.
        edgeattn: version that measured.
        bundle: what ran.
        machine: where.
        setup: how.
        quantity: what was measured.
        warmup: passes before, which were not timed.
        phases: the figures.
        cache_bytes: keys and values at the end; None for an encoder.
        peak_memory_bytes: most of the CPU's memory that the process held, loading the bundle
            included; None where the system does not say. Memory of a GPU of its own is not in it.
        gpu_memory_bytes: what loading and running took of the GPU's free memory, as the driver
            tells it, with whatever else used the GPU meanwhile; None where the CPU runs.
        before: the machine before the timed passes.
        after: and right after them.
    """

    schema_version: Literal[1]
    edgeattn: str
    bundle: BundleFacts
    machine: Machine
    setup: Setup
    quantity: Quantity
    warmup: int = Field(ge=0)
    phases: tuple[Phase, ...]
    cache_bytes: int | None = Field(ge=0)
    peak_memory_bytes: int | None = Field(ge=0)
    gpu_memory_bytes: int | None = Field(default=None, ge=0)
    before: Moment
    after: Moment

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the speeds included for readers of the file."""
        content = self.model_dump(mode="json")
        speeds = {f"{one.name}_{one.unit}_per_second": one.per_second for one in self.phases}
        return {**content, "speeds": speeds}

    def write(self, path: Path) -> None:
        """Writes it as a JSON file, which appears whole or not at all.

        Raises:
            BundleError: the disk refuses.
        """
        write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def read_record(path: Path) -> BenchRecord:
    """Reads a file that `BenchRecord.write` wrote.

    Raises:
        RuntimeInputError: it cannot be read, or is no such file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise _unfit(path, f"the system says: {error.strerror or error}") from error
    try:
        found = json.loads(content) if len(content) <= _MOST_BYTES else None
    except (ValueError, RecursionError) as error:
        raise _unfit(path, "it does not parse") from error
    if not isinstance(found, dict):
        raise _unfit(path, "it holds no such object")
    if (version := found.pop("schema_version", None)) != SCHEMA_VERSION:
        raise _unfit(path, f"its schema_version is {version!r:.40}, not {SCHEMA_VERSION}")
    found.pop("speeds", None)  # follow from the phases
    try:
        # through JSON, which has no tuples: strict validation of Python's values wants them
        return BenchRecord.model_validate_json(
            json.dumps({**found, "schema_version": SCHEMA_VERSION})
        )
    except (ValidationError, RecursionError) as error:
        raise _unfit(path, _first_problem(error)) from error


def _first_problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "it is nested too deep"
    first = error.errors()[0]
    return f"'{'.'.join(map(str, first['loc']))}' does not fit ({first['msg']})"


def _unfit(path: Path, came: str) -> RuntimeInputError:
    return RuntimeInputError(
        expected=f"a record of `edgeattn bench` in {path}",
        came=came,
        todo="measure again with `edgeattn bench BUNDLE -o FILE`",
    )


@dataclass(frozen=True)
class Ratio:
    """One figure of two records.

    Attributes:
        figure: its name.
        unit: of both.
        first: of record A.
        second: of record B.
    """

    figure: str
    unit: str
    first: float
    second: float

    @property
    def ratio(self) -> float:
        """B over A."""
        return self.second / self.first


@dataclass(frozen=True)
class Comparison:
    """Two records of one quantity.

    Attributes:
        quantity: what was measured.
        ratios: of their figures.
        differences: what else differs, a clause each; empty where only time lies between them.
    """

    quantity: Quantity
    ratios: tuple[Ratio, ...]
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        ratios = [{**vars(one), "ratio": one.ratio} for one in self.ratios]
        return {
            "quantity": self.quantity.model_dump(mode="json"),
            "ratios": ratios,
            "differences": list(self.differences),
        }


def compare(first: BenchRecord, second: BenchRecord) -> Comparison:
    """Sets two records of the same quantity side by side.

    Raises:
        RuntimeInputError: they measured different quantities, of which no ratio means anything.
    """
    names = [[(one.name, one.unit) for one in record.phases] for record in (first, second)]
    if first.quantity != second.quantity or names[0] != names[1]:
        raise RuntimeInputError(
            expected="two records of the same quantity",
            came=f"A is of {first.quantity}, B of {second.quantity}",
            todo="measure both bundles with the same --tokens, --new-tokens and --rows",
        )
    return Comparison(
        first.quantity, tuple(_ratios(first, second)), tuple(_differences(first, second))
    )


def _ratios(first: BenchRecord, second: BenchRecord) -> Iterator[Ratio]:
    for a, b in zip(first.phases, second.phases, strict=True):
        yield Ratio(f"{a.name} median", "s", a.median_seconds, b.median_seconds)
        yield Ratio(f"{a.name} p90", "s", a.p90_seconds, b.p90_seconds)
        yield Ratio(f"{a.name} speed", f"{a.unit}/s", a.per_second, b.per_second)
    for name in ("peak_memory_bytes", "gpu_memory_bytes", "cache_bytes"):
        sizes = getattr(first, name), getattr(second, name)
        if all(sizes):  # a model without a cache has one of 0 bytes
            yield Ratio(name.removesuffix("_bytes").replace("_", " "), "bytes", *sizes)


def _differences(first: BenchRecord, second: BenchRecord) -> Iterator[str]:
    """The facts that differ, the machine's first: a ratio across devices is no speed-up."""
    for part in ("machine", "bundle", "setup"):
        a, b = getattr(first, part), getattr(second, part)
        for name in type(a).model_fields:
            one, other = getattr(a, name), getattr(b, name)
            if one != other:
                yield f"{part}: {name} is {_said(one)} in A, {_said(other)} in B"


def _said(value: object) -> str:
    return "not known" if value is None else str(value)
