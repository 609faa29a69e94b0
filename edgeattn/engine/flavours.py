"""The two TensorRTs, and where their Python bindings and libraries are.

TensorRT-RTX comes from PyPI and builds on any x86-64 machine; TensorRT comes from NVIDIA, on a
Jetson as a package of the system, and builds for the GPU it runs on. Both have the same API.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from edgeattn.errors import MissingDependencyError

FlavourName = Literal["tensorrt", "tensorrt-rtx"]

# JetPack installs for the system's Python, which a virtual environment does not see.
_SYSTEM_PACKAGES = (
    "/usr/lib/python{0.major}.{0.minor}/dist-packages",
    "/usr/lib/python3/dist-packages",
)


@dataclass(frozen=True)
class Flavour:
    """One of the two.

    Attributes:
        name: as in a target's file.
        title: as its maker writes it.
        bindings: the Python module.
        libraries: the Python package that holds its shared libraries; None where the system does.
        bare_name: the parser opens its library by this name, the wheel ships it with a version
            behind; None where the system has it under this name.
        todo: how to get it.
        builds_for_any: whether it builds for GPUs that are not in the machine.
    """

    name: FlavourName
    title: str
    bindings: str
    libraries: str | None
    bare_name: str | None
    todo: str
    builds_for_any: bool

    def is_available(self) -> bool:
        """Whether it is installed; does not load it."""
        needed = [self.bindings, *([self.libraries] if self.libraries else [])]
        return all(_is_found(name) for name in needed)

    def require(self) -> None:
        """Refuses where it is not installed.

        Raises:
            MissingDependencyError: with how to get it.
        """
        if not self.is_available():
            raise MissingDependencyError(
                expected=f"{self.title}, which builds the engine",
                came=f"there is no Python module {self.bindings} for {sys.executable}",
                todo=self.todo,
            )

    def load(self) -> Any:
        """Imports the bindings into this process.

        Raises:
            MissingDependencyError: they are not installed, or do not load.
        """
        self.require()
        sys.path += import_paths()
        try:
            return importlib.import_module(self.bindings)
        except ImportError as error:
            raise MissingDependencyError(
                expected=f"{self.title}, which runs the engine",
                came=f"its Python module {self.bindings} does not load ({error})",
                todo=self.todo,
            ) from error

    def environment(self, folder: Path) -> dict[str, str]:
        """The environment of a process that loads it.

        Args:
            folder: an empty one, for links.
        """
        spec = find_spec(self.libraries) if self.libraries else None
        places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
        if self.bare_name:
            versioned = sorted(f for place in places for f in place.glob(f"{self.bare_name}*"))
            if versioned:
                (folder / self.bare_name).symlink_to(versioned[-1])
        paths = [str(folder), *map(str, places), os.environ.get("LD_LIBRARY_PATH", "")]
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(p for p in paths if p)}


TENSORRT_RTX = Flavour(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    bindings="tensorrt_rtx",
    libraries="tensorrt_rtx_libs",
    bare_name="libtensorrt_rtx.so",
    todo="install edgeattn[rtx]",
    builds_for_any=True,
)
TENSORRT = Flavour(
    name="tensorrt",
    title="TensorRT",
    bindings="tensorrt",
    libraries=None,
    bare_name=None,
    todo="on a Jetson: sudo apt install python3-libnvinfer; elsewhere: install edgeattn[tensorrt]",
    builds_for_any=False,
)
FLAVOURS = {flavour.name: flavour for flavour in (TENSORRT_RTX, TENSORRT)}


def import_paths() -> list[str]:
    """Folders of the system's packages, to look in after a virtual environment's own."""
    return [folder for folder in _system_folders() if folder not in sys.path]


def _system_folders() -> list[str]:
    places = [place.format(sys.version_info) for place in _SYSTEM_PACKAGES]
    return [place for place in places if os.path.isdir(place)]


def _is_found(name: str) -> bool:
    if find_spec(name) is not None:
        return True
    return PathFinder.find_spec(name, import_paths()) is not None
