"""What an engine is, in a JSON file beside it; and whether it runs on this machine.

TensorRT's own answer to an engine in the wrong place is a "magic tag" or a failed assertion. Here
each case has its sentence, before anything is loaded.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgeattn.bundle.bundle import MODEL, PLUGINS, Bundle, hash_file
from edgeattn.devices.probe import Probe
from edgeattn.engine.flavours import FLAVOURS, FlavourName
from edgeattn.engine.plugins import LIBRARY, PLUGIN_ABI, read_library
from edgeattn.errors import BundleError, EdgeattnError, LoweringError

ENGINES = "engines"
SCHEMA_VERSION = 1
# An engine loads in the very release it was built by: major, minor and patch.
_RELEASE = 3


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PluginRecord(_Record):
    """The plugin library an engine needs.

    Attributes:
        abi: see `PLUGIN_ABI`.
        file: path inside the bundle.
        sha256: of the library.
        layers: plugin layers in the network.
    """

    abi: int
    file: str
    sha256: str
    layers: int


class LayerRecord(_Record):
    """One layer, see `edgeattn.engine.build.Layer`."""

    name: str
    kind: str
    precision: str


class EngineRecord(_Record):
    """Everything that decides where an engine runs, and what its build was like.

    Attributes:
        schema_version: of this record.
        edgeattn: version that built it.
        engine: file name.
        bytes: its size.
        sha256: of its content.
        model_sha256: of the graph it was built from.
        targets: canonical NAME@SOFTWARE it was built for.
        flavour: which TensorRT.
        tensorrt: its version.
        sms: compute capabilities.
        arch: processor of the machine that built it.
        gpu: the GPU it was built on; None where it was built without the device.
        driver: CUDA version of the driver there.
        plugins: the library it needs; None for none.
        profiles: optimisation profiles in their order: min:opt:max by dimension.
        stripped: whether its weights are put in from the model when it is loaded.
        layers: of the network.
        layer_source: "engine inspector", or "network" where no GPU could load the engine.
        layer_list: name, kind and precision of each.
        seconds: parsing and building.
        peak_rss_mb: of the process that built it.
    """

    schema_version: int
    edgeattn: str
    engine: str
    bytes: int = Field(ge=0, lt=2**63)
    sha256: str
    model_sha256: str
    targets: tuple[str, ...]
    flavour: FlavourName
    tensorrt: str
    sms: tuple[Annotated[int, Field(ge=-(2**63), lt=2**63)], ...]
    arch: str
    gpu: str | None
    driver: str | None
    plugins: PluginRecord | None
    profiles: dict[str, dict[str, str]]
    stripped: bool
    layers: int
    layer_source: Literal["engine inspector", "network"]
    layer_list: tuple[LayerRecord, ...]
    seconds: dict[str, float]
    peak_rss_mb: float | None

    @property
    def where(self) -> str:
        """Whether it has been near its device."""
        return f"built on {self.gpu}" if self.gpu else "not run on this device"

    def to_json(self) -> str:
        """Readable JSON."""
        return self.model_dump_json(indent=2) + "\n"


@dataclass(frozen=True)
class Engine:
    """An engine of a bundle.

    Attributes:
        path: the file.
        record: what stands beside it.
    """

    path: Path
    record: EngineRecord

    @property
    def selftest_file(self) -> Path:
        """Where the outcome of its first run on a device is kept."""
        return self.path.with_suffix(".selftest.json")


def read_engines(bundle: Bundle) -> tuple[Engine, ...]:
    """The engines that were built for a bundle, the newest first.

    Raises:
        BundleError: a record does not read.
    """
    files = sorted(
        (bundle.path / ENGINES).glob("*.engine.json"), key=lambda f: -f.stat().st_mtime_ns
    )
    return tuple(read_engine(file.with_suffix("")) for file in files)


def read_engine(path: Path) -> Engine:
    """An engine with the record that lies beside it.

    Raises:
        BundleError: there is no record, or it does not read.
    """
    file = path.with_name(f"{path.name}.json")
    try:
        return Engine(path, EngineRecord.model_validate_json(file.read_bytes()))
    except FileNotFoundError as error:
        raise BundleError(
            expected=f"an engine that edgeattn build made, with its record {file}",
            came="there is no such file",
            todo="name a file in the bundle's folder engines, or build one with edgeattn build",
        ) from error
    except (OSError, ValidationError) as error:
        raise BundleError(
            expected=f"the record of an engine in {file}",
            came="it does not read",
            todo="delete it, and build the engine again with edgeattn build",
        ) from error


def require_runs_here(engine: Engine, bundle: Bundle, found: Probe) -> None:
    """Refuses an engine that is damaged, stale, or made for another place.

    Args:
        engine: of the bundle.
        bundle: opened, so that its other files are sound.
        found: this machine.

    Raises:
        BundleError: the engine was changed or belongs to another graph, or needs another library.
        LoweringError: it was made for another GPU, processor or TensorRT.
        MissingDependencyError: its TensorRT is not installed.
    """
    require_sound(engine, bundle)
    record, name = engine.record, engine.path.name
    if found.gpu is None:
        raise LoweringError(
            expected=f"a GPU with SM {_numbers(record.sms)}, to run {name}",
            came=f"this machine has none ({found.gpu_problem})",
            todo="run it on the device, or leave out --backend tensorrt to use ONNX Runtime here",
        )
    if found.gpu.sm not in record.sms:
        raise _elsewhere(f"SM {found.gpu.sm}", name, f"it was built for SM {_numbers(record.sms)}")
    if record.arch != found.arch:
        raise _elsewhere(found.arch, name, f"it was built on {record.arch}")
    _require_tensorrt(record, name, found)
    _require_plugins(record, bundle)


def require_sound(engine: Engine, bundle: Bundle) -> None:
    """Refuses an engine that is damaged or stale, wherever it is for.

    Args:
        engine: of the bundle.
        bundle: opened, so that its other files are sound.

    Raises:
        BundleError: the engine was changed, or belongs to another graph.
    """
    _require_whole(engine)
    if engine.record.model_sha256 != bundle.manifest.files[MODEL].sha256:
        raise BundleError(
            expected=f"{engine.path.name} to be built from the bundle's own graph",
            came="the graph is another one: the bundle was exported again",
            todo="build the engine again with edgeattn build --force",
        )


def _require_whole(engine: Engine) -> None:
    record, path = engine.record, engine.path
    came = ""
    if not path.is_file():
        came = "there is none"
    elif path.stat().st_size != record.bytes:
        came = f"it has {path.stat().st_size}"
    elif hash_file(path) != record.sha256:
        came = "its content was changed"
    if came:
        raise BundleError(
            expected=f"the engine {path.name} of {record.bytes} bytes, as its record says",
            came=came,
            todo="copy it again, or build it again with edgeattn build --force",
        )


def _require_tensorrt(record: EngineRecord, name: str, found: Probe) -> None:
    flavour = FLAVOURS[record.flavour]
    flavour.require()
    here = found.tensorrt if record.flavour == "tensorrt" else found.tensorrt_rtx
    if here is not None and _release(here) != _release(record.tensorrt):
        raise _elsewhere(
            f"{flavour.title} {here}", name, f"it was built by {flavour.title} {record.tensorrt}"
        )


def _require_plugins(record: EngineRecord, bundle: Bundle) -> None:
    needed = record.plugins
    if needed is None:
        return
    if needed.abi != PLUGIN_ABI:
        raise BundleError(
            expected=f"an engine with plugins of ABI {PLUGIN_ABI}",
            came=f"{record.engine} has them of ABI {needed.abi}",
            todo="export the bundle again with this edgeattn, and build it again",
        )
    library = read_library(bundle.path / needed.file)
    library.require(platform.machine())
    if hash_file(library.path) != needed.sha256:
        raise BundleError(
            expected=f"the plugin library that {record.engine} was built with",
            came=f"{needed.file} is another one",
            todo="build the engine again with edgeattn build --force",
        )


def _elsewhere(here: str, name: str, came: str) -> LoweringError:
    return LoweringError(
        expected=f"an engine for {here}, which is what this machine has",
        came=f"{name} does not fit: {came}",
        todo="build one here with edgeattn build",
    )


def choose_engine(bundle: Bundle, found: Probe, named: Path | None = None) -> Engine:
    """The newest engine of a bundle that runs on this machine, or the one that is named.

    Raises:
        EdgeattnError: there is none; where there are some, what is wrong with the newest.
    """
    if named is not None:
        engine = read_engine(named)
        require_runs_here(engine, bundle, found)
        return engine
    engines = read_engines(bundle)
    if not engines:
        raise BundleError(
            expected=f"an engine in {bundle.path / ENGINES}",
            came="there is none",
            todo=f"build one with edgeattn build {bundle.path}",
        )
    refusals = []
    for engine in engines:
        try:
            require_runs_here(engine, bundle, found)
        except EdgeattnError as refusal:
            refusals.append(refusal)
        else:
            return engine
    raise refusals[0]


def _numbers(sms: tuple[int, ...]) -> str:
    return " or ".join(map(str, sms))


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:_RELEASE])


def library_record(bundle: Bundle, arch: str, layers: int) -> PluginRecord | None:
    """The bundle's plugin library for a processor, for the record of an engine.

    Args:
        bundle: an opened bundle.
        arch: "x86_64" or "aarch64".
        layers: plugin layers of the network; 0 needs no library.
    """
    name = f"{PLUGINS}/{arch}/{LIBRARY}"
    listed: Mapping[str, Any] = bundle.manifest.files
    if not layers or name not in listed:
        return None
    return PluginRecord(abi=PLUGIN_ABI, file=name, sha256=listed[name].sha256, layers=layers)
