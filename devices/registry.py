"""Targets by name: `parse_target("jetson-orin@jetpack6.2")` gives the device and its software.

A target is one TOML file next to this module; adding one needs no Python.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from edgeattn.devices.schema import Device, Dtype, Flavour, Software, WeightBits
from edgeattn.errors import EdgeattnError, UsageError, unknown_name

if sys.version_info >= (3, 11):
    from importlib.resources.abc import Traversable

    import tomllib
else:
    from importlib.abc import Traversable

    import tomli as tomllib

_SOFTWARE_FILE = "software.toml"
_Record = TypeVar("_Record", bound=BaseModel)


@dataclass(frozen=True)
class Target:
    """A device together with the software it runs: what `--target NAME[@SOFTWARE]` means."""

    device: Device
    software: Software

    @property
    def name(self) -> str:
        """The canonical name, aliases and defaults resolved."""
        return f"{self.device.name}@{self.software.name}"

    @property
    def flavour(self) -> Flavour:
        """The engine edgeattn builds for this target."""
        return self.software.stack.engine

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """Activation dtypes that hardware and software both take."""
        return tuple(d for d in self.device.dtypes.allowed if d in self.software.graph.dtypes)

    @property
    def preferred_dtype(self) -> Dtype:
        """The activation dtype used when the user names none."""
        return self.device.dtypes.preferred

    @property
    def weight_bits(self) -> tuple[WeightBits, ...]:
        """Widths of quantised weights; float weights are always allowed."""
        return self.device.weights.bits

    @property
    def int4_group_sizes(self) -> tuple[int, ...]:
        """Weights per int4 scale; empty where int4 is not allowed."""
        return self.software.graph.int4_group_sizes if 4 in self.weight_bits else ()

    def opset(self, *, int4: bool) -> int:
        """The opset to write.

        Args:
            int4: whether the graph holds int4 weights.
        """
        return self.software.graph.opset_int4 if int4 else self.software.graph.opset


@dataclass(frozen=True)
class Registry:
    """All devices and software stacks, checked against each other."""

    devices: dict[str, Device]
    software: dict[str, Software]
    aliases: dict[str, str]

    def parse_target(self, text: str) -> Target:
        """Reads `NAME[@SOFTWARE]`.

        Args:
            text: a target's name or alias, optionally with one of its software stacks.

        Raises:
            UsageError: the text does not parse, or a name is unknown.
        """
        name, at, software = text.strip().lower().partition("@")
        if not name or (at and not software) or "@" in software:
            raise UsageError(
                expected="a target written NAME or NAME@SOFTWARE",
                came=f"'{text}' is not of that form",
                todo="write for example jetson-orin@jetpack6.2",
            )
        name = self.aliases.get(name, name)
        if name not in self.devices:
            raise unknown_name("target", name, [*self.devices, *self.aliases])
        device = self.devices[name]
        return Target(device, self._software_of(device, software or device.software.default))

    def _software_of(self, device: Device, name: str) -> Software:
        if name in device.software.allowed:
            return self.software[name]
        if name in self.software:
            raise UsageError(
                expected=f"software that {device.name} runs",
                came=f"'{name}' is made for other devices",
                todo=f"choose {' or '.join(device.software.allowed)}",
            )
        raise unknown_name(f"software of {device.name}", name, device.software.allowed)


def load_registry(extra: Path | None = None) -> Registry:
    """Reads the target files that ship with edgeattn.

    Args:
        extra: a folder with further target files, and perhaps a software.toml; a name in it
            replaces ours.

    Raises:
        EdgeattnError: a file does not parse, or two files contradict each other.
    """
    if extra is not None and not extra.is_dir():
        raise UsageError(
            expected="a folder of target files",
            came=f"{extra} is not a folder",
            todo="pass a folder that holds <target>.toml files",
        )
    folders: list[Traversable] = [files("edgeattn.devices"), *([extra] if extra else [])]
    software: dict[str, Software] = {}
    for folder in folders:
        if (folder / _SOFTWARE_FILE).is_file():
            software = _read_software(folder / _SOFTWARE_FILE, software)
    devices: dict[str, Device] = {}
    for folder in folders:
        for device in _read_devices(folder, software):
            devices[device.name] = device
    devices = {name: devices[name] for name in sorted(devices)}
    return Registry(devices, software, _aliases(devices))


@lru_cache(maxsize=1)
def _shipped() -> Registry:
    return load_registry()


def parse_target(text: str) -> Target:
    """Reads `NAME[@SOFTWARE]` among our own targets; see `Registry.parse_target`."""
    return _shipped().parse_target(text)


def device_names() -> tuple[str, ...]:
    """The names of all targets, without aliases."""
    return tuple(_shipped().devices)


def all_devices() -> tuple[Device, ...]:
    """All targets' devices, by name."""
    return tuple(_shipped().devices.values())


def all_software() -> tuple[Software, ...]:
    """All software stacks, as they stand in the file."""
    return tuple(_shipped().software.values())


def all_targets() -> tuple[Target, ...]:
    """Every device with every software stack it runs."""
    registry = _shipped()
    return tuple(
        Target(device, registry.software[software])
        for device in registry.devices.values()
        for software in device.software.allowed
    )


def _read_software(file: Traversable, known: dict[str, Software]) -> dict[str, Software]:
    out = dict(known)
    for name, table in _read_toml(file).items():
        content = {"name": name, **table} if isinstance(table, dict) else {"name": name}
        graph: Any = content.get("graph")
        if isinstance(graph, dict):
            content["graph"] = _with_inherited(graph, out, file, f"{name}.graph.like")
        out[name] = _validate(Software, content, file, prefix=f"{name}.")
    return out


def _with_inherited(
    graph: dict[str, Any], known: dict[str, Software], file: Traversable, field: str
) -> dict[str, Any]:
    """The graph rules with those of the stack that `like` names underneath, sources joined."""
    own = dict(graph)
    like = own.pop("like", None)
    if like is None:
        return own
    if not isinstance(like, str) or like not in known:
        raise _broken(file, field, f"no software '{like}' is described further up")
    base = known[like].graph
    source = own.get("source")
    if isinstance(source, str) and source.strip():
        own["source"] = f"{source}; the rest as {like}: {base.source}"
    return {**base.model_dump(exclude={"source"}), **own}


def _read_devices(folder: Traversable, software: dict[str, Software]) -> Iterator[Device]:
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".toml") or file.name == _SOFTWARE_FILE:
            continue
        device = _validate(Device, _read_toml(file), file)
        if file.name != f"{device.name}.toml":
            raise _broken(file, "name", f"'{device.name}' is not the name of the file")
        for name in device.software.allowed:
            if name not in software:
                raise _broken(file, "software.allowed", f"no software '{name}' is described")
        engine = software[device.software.default].stack.engine
        if device.flavour != engine:
            raise _broken(file, "software.flavour", f"the default software runs {engine}")
        if device.dtypes.preferred not in software[device.software.default].graph.dtypes:
            raise _broken(file, "dtypes.preferred", "the default software does not take it")
        yield device


def _aliases(devices: dict[str, Device]) -> dict[str, str]:
    out: dict[str, str] = {}
    for device in devices.values():
        for alias in device.aliases:
            if alias in devices or alias in out:
                owner = out.get(alias, alias)
                raise EdgeattnError(
                    expected="every alias to belong to one target",
                    came=f"'{alias}' of {device.name} already means {owner}",
                    todo=f"remove it from the aliases in {device.name}.toml",
                )
            out[alias] = device.name
    return out


def _read_toml(file: Traversable) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgeattnError(
            expected="a TOML file",
            came=f"{file.name} does not parse ({error})",
            todo="correct that line",
        ) from error


def _validate(
    kind: type[_Record], content: dict[str, Any], file: Traversable, prefix: str = ""
) -> _Record:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = prefix + ".".join(str(part) for part in first["loc"])
        message = re.sub(r"^Value error, ", "", first["msg"])
        raise _broken(file, field or "the file", message) from error


def _broken(file: Traversable, field: str, problem: str) -> EdgeattnError:
    return EdgeattnError(
        expected="a target file that fits the schema",
        came=f"in {file.name}, {field} is wrong: {problem}",
        todo="correct that field",
    )
