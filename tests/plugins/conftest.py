"""Fixtures for the plugin library: built with cubins for the fake libcuda, driven by a program."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeattn.engine.embed_cubins import embed_cubins
from edgeattn.engine.toolchain import build_library, find_toolchain
from edgeattn.errors import MissingDependencyError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
OP = "recurrent_linear_attention"  # whose dummies its own tests know; others are as in the table
_FAKE_TYPES = {"*T": "p", "*fp32": "p", "*i32": "p", "*i8": "p", "i32": "i", "fp32": "f"}
_SYSROOT = "/usr/aarch64-linux-gnu"

# Which dummies there are: (SM, dtype, BLOCK).
VARIANTS = (
    *itertools.product((80, 87, 110), ("fp16",), (16, 32, 64, 128)),
    *itertools.product((80, 87), ("bf16",), (64,)),
    (120, "fp16", 64),
)
TABLE_SM = 99  # no GPU is: all kernels have dummies for it as in variants.toml
CHUNKS = (64, 16)  # rows, without and with channels
SPANS = (64, 128)  # rows, elsewhere and on SM 110
SMALL_SHARED, LARGE_SHARED = 1024, 50_000  # below and above what needs no opting in


@dataclass(frozen=True)
class Launch:
    """One entry of the fake libcuda's log; pointers as numbers."""

    name: str
    label: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: str
    arguments: dict[str, float]

    @property
    def kernel(self) -> str:
        """Its name within the operator."""
        return self.name.partition(".")[2]


@dataclass
class Answers:
    """What the driver printed and the fake libcuda wrote down."""

    lines: dict[str, list[str]]
    calls: list[str]
    signatures: dict[str, list[str]]
    stderr: str

    def __getitem__(self, command: str) -> str:
        """The last answer to a command."""
        return self.lines[command][-1]

    @property
    def logged(self) -> str:
        """What went to TensorRT's logger, severity in front."""
        return "\n".join(self.lines.get("log", []))

    @property
    def addresses(self) -> dict[str, int]:
        """Of the tensors, the last of each name."""
        pairs = (line.split() for line in self.lines["tensor"])
        return {name: int(address, 16) for name, address in pairs}

    @property
    def loaded(self) -> list[str]:
        return [line.split()[1] for line in self.calls if line.startswith("cuModuleLoadData")]

    @property
    def launches(self) -> list[Launch]:
        return [self._launch(line) for line in self.calls if line.startswith("cuLaunchKernel")]

    def _launch(self, line: str) -> Launch:
        _, label, *pairs = line.split()
        fields = dict(pair.split("=") for pair in pairs)
        name = label.split("-")[0]
        names = [*self.signatures[name], "global_scratch", "profile_scratch"]
        texts = fields["arguments"].split(",")
        values = [0.0 if t == "(nil)" else int(t, 16) if "x" in t else float(t) for t in texts]
        grid = tuple(int(n) for n in fields["grid"].split(","))
        threads, *rest = (int(n) for n in fields["block"].split(","))
        assert rest == [1, 1]
        arguments = dict(zip(names, values, strict=True))
        shared, stream = int(fields["shared"]), fields["stream"]
        return Launch(name, label, grid, threads, shared, stream, arguments)


@dataclass(frozen=True)
class Library:
    """A built library and what runs it."""

    path: Path
    driver: tuple[str, ...]
    fake_cuda: Path
    signatures: dict[str, list[str]]

    def drive(
        self,
        *commands: str,
        cuda: Path | None = None,
        fails: bool = False,
        tensorrt: tuple[int, int] = (10, 101401),
        **settings: object,
    ) -> Answers:
        """Runs commands of plugin_driver.cpp.

        Args:
            commands: one per line.
            cuda: folder of another libcuda than the fake one.
            fails: whether the driver itself ends with an error.
            tensorrt: the major whose layout its logger has, and what getInferLibVersion says.
            settings: of the fake libcuda, FAKE_CUDA_... without that.
        """
        log = self.fake_cuda / "log"
        log.unlink(missing_ok=True)
        environment = {f"FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
        environment |= {"LD_LIBRARY_PATH": str(cuda or self.fake_cuda), "FAKE_CUDA_LOG": str(log)}
        layout, version = tensorrt
        environment["FAKE_TENSORRT_VERSION"] = str(version)
        logger = self.fake_cuda / f"libfake_logger{layout}.so"
        done = subprocess.run(
            [*self.driver, str(self.path), str(logger)],
            input="\n".join(commands),
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == int(fails), done.stdout + done.stderr
        lines = defaultdict(list)
        for line in done.stdout.splitlines():
            command, _, rest = line.partition(" ")
            lines[command].append(rest)
        calls = log.read_text().splitlines() if log.exists() else []
        return Answers(lines, calls, self.signatures, done.stderr)


@pytest.fixture(scope="session")
def signatures(repository: Path) -> dict[str, list[tuple[str, str]]]:
    """Arguments of every kernel in the generated headers: names and types."""
    headers = sorted((repository / "plugins" / "generated").glob("*_kernels.h"))
    text = "\n".join(header.read_text() for header in headers)
    found = re.findall(r'kNAME = "(\S+)";[^;]+kSIGNATURE\s+=([^;]+);', text)
    literals = {name: "".join(re.findall(r'"([^"]*)"', value)) for name, value in found}
    return {
        name: [(argument.split()[0], argument.split()[1]) for argument in literal.split(", ")]
        for name, literal in literals.items()
    }


@pytest.fixture(scope="session")
def write_manifest(signatures: dict[str, list[tuple[str, str]]]) -> Callable[..., Path]:
    """A function from a folder and variants to the manifest of dummy cubins."""

    def write(folder: Path, variants: Iterable[tuple[int, str, int]] = VARIANTS) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        cubins = [
            cubin
            for name, arguments in signatures.items()
            for sm, dtype, constants in _constants(name, tuple(variants))
            for cubin in [_dummy(name, arguments, sm, dtype, constants)]
        ]
        for cubin in cubins:
            content = cubin.pop("content")
            (folder / cubin["file"]).write_bytes(content)
            cubin["sha256"] = hashlib.sha256(content).hexdigest()
        hashed = hashlib.sha256(json.dumps(cubins).encode()).hexdigest()
        content = {"version": 1, "triton": "3.7.1", "fp_fusion": True, "kernels_sha256": hashed}
        path = folder / "manifest.json"
        path.write_text(json.dumps({**content, "cubins": cubins}))
        return path

    return write


def _constants(
    name: str, variants: Iterable[tuple[int, str, int]]
) -> Iterator[tuple[int, str, dict[str, int]]]:
    """SM, dtype and constants of a kernel's dummies."""
    table = tomllib.loads((REPOSITORY / "kernels" / "variants.toml").read_text())["kernels"]
    axes = [
        [dict(zip(key.split(", "), np.atleast_1d(row).tolist(), strict=True)) for row in rows]
        for key, rows in table[name]["constants"].items()
    ]
    of_table = [
        {n: v for part in parts for n, v in part.items()} for parts in itertools.product(*axes)
    ]
    known = name.startswith(f"{OP}.")
    for sm in (TABLE_SM,) if known else (*{sm for sm, _, _ in variants}, TABLE_SM):
        yield from ((sm, "fp16", constants) for constants in of_table)
    if not known:
        return
    for sm, dtype, block in variants:
        rows = [{"BLOCK": block, "BLOCK_V": values} for values in sorted({min(block, 32), block})]
        chunks = [
            {**rows[0], "CHANNELS": channels, "CHUNK": CHUNKS[channels], "SPAN": SPANS[sm == 110]}
            for channels in (0, 1)
        ]
        yield from ((sm, dtype, one) for one in (rows if name == f"{OP}.decode" else chunks))


def _dummy(
    name: str, arguments: Sequence[tuple[str, str]], sm: int, dtype: str, constants: dict[str, int]
) -> dict[str, Any]:
    small = name == f"{OP}.decode"
    label = "-".join((name, dtype, *(f"{n}{v}" for n, v in constants.items()), f"sm{sm}"))
    types = "".join(_FAKE_TYPES[kind] for _, kind in arguments)
    return {
        "kernel": name,
        "dtype": dtype,
        "constants": constants,
        "sm": sm,
        "file": f"{label}.cubin",
        "entry": f"{name.partition('.')[2]}_entry",
        "shared": SMALL_SHARED if small else LARGE_SHARED,
        "warps": 8 if small else 4,
        "arguments": arguments,
        "grid": ["1", "1", "1"],
        "sizes": ["B"],
        "content": f"fake {label} {types}pp\n\0".encode(),
    }


@pytest.fixture(scope="session")
def build(
    repository: Path,
    tensorrt_headers: Path,
    embedded: Path,
    signatures: dict[str, list[tuple[str, str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Library]:
    """A function from an architecture to the library for it, and its driver.

    The driver is run by `runner`; `sources` replace those of dummy cubins.
    """

    def make(arch: str, *runner: str, sources: Path = embedded) -> Library:
        try:
            toolchain = find_toolchain(arch, tensorrt=tensorrt_headers)
        except MissingDependencyError as error:
            pytest.skip(str(error))
        out = tmp_path_factory.mktemp(arch)
        path = build_library(toolchain, repository / "plugins", sources, out)
        fakes = ("fake_cuda", "fake_logger10", "fake_logger11")
        command = [toolchain.cmake, "--build", str(out), "--target", "plugin_driver", *fakes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        names = {n: [a for a, _ in given] for n, given in signatures.items()}
        return Library(path, (*runner, str(out / "plugin_driver")), out / "fake", names)

    return make


@pytest.fixture(scope="session")
def embedded(write_manifest: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources with dummy cubins."""
    folder = tmp_path_factory.mktemp("embedded")
    embed_cubins(write_manifest(folder / "cubins"), folder / "sources")
    return folder / "sources"


@pytest.fixture(scope="session")
def library(build: Callable[..., Library]) -> Library:
    """The library for this machine."""
    return build(platform.machine())


@pytest.fixture(scope="session")
def aarch64_library(build: Callable[..., Library]) -> Library:
    """The library for Jetson; its driver runs in qemu, with the C library of a cross compiler."""
    return build("aarch64", "qemu-aarch64", "-L", os.environ.get("QEMU_LD_PREFIX", _SYSROOT))
