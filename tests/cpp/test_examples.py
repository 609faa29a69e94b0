"""examples/cpp, built against the installed package, on this machine and on an emulated Jetson.

With a fake TensorRT and GPU they print what Python gives. An emulated Jetson has no GPU: there a
bundle is opened and checked, its plugin library read, and the missing driver reported.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from cmake_projects import configure, emulator, run
from fake_engine import write_engine
from library_files import library_file, table

from edgeattn.bundle.bundle import hash_file
from edgeattn.engine.plugins import PLUGIN_ABI, read_library
from edgeattn.engine.profiles import DecoderProfile, EncoderProfile, Range
from edgeattn.engine.toolchain import find_cmake
from edgeattn.errors import EdgeattnError
from edgeattn.runtime import EncoderSession, Session, generate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "cpp"


@dataclass(frozen=True)
class Examples:
    """Programs and how they are started."""

    folder: Path
    arch: str
    runner: tuple[str, ...]

    def start(
        self,
        name: str,
        *arguments: object,
        given: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.runner, str(self.folder / name), *map(str, arguments)],
            input=given,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def build(
    installed: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Examples]:
    def make(arch: str) -> Examples:
        runner = emulator(arch)
        folder = tmp_path_factory.mktemp(f"examples-{arch}")
        found = f"-Dedgeattn_ROOT={installed(arch)}"
        configure(EXAMPLES, folder, arch, found, "-DCMAKE_FIND_ROOT_PATH_MODE_PACKAGE=BOTH")
        run([find_cmake(), "--build", folder])
        return Examples(folder, arch, runner)

    return make


@pytest.fixture(scope="session")
def native(build: Callable[[str], Examples]) -> Examples:
    return build(platform.machine())


@pytest.fixture(scope="session", params=[platform.machine(), "aarch64"])
def examples(request: pytest.FixtureRequest, build: Callable[[str], Examples]) -> Examples:
    return build(request.param)


def text(*arguments: object, given: str = "") -> str:
    command = [sys.executable, EXAMPLES / "text.py", *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def test_generate(
    native: Examples, export_stories: Callable[..., Path], there: dict[str, str], tensorrt: str
) -> None:
    bundle = export_stories(target="a100", context=96)
    profiles = (
        DecoderProfile("prefill", Range(1, 1, 1), Range(1, 32, 32), Range(0, 0, 64)),
        DecoderProfile("decode", Range(1, 1, 1), Range(1, 1, 1), Range(0, 64, 95)),
    )
    write_engine(bundle, profiles, record={"tensorrt": tensorrt})
    ids = text(bundle, "encode", "Once upon a time")
    done = native.start("generate", bundle, 20, given=ids, environment=there)
    assert done.returncode == 0, done.stderr
    expected = generate(Session.open(bundle), "Once upon a time", max_new_tokens=20)
    assert text(bundle, "decode", given=done.stdout) == expected.text.lstrip() + "\n"
    refused = native.start("generate", bundle, 20, given="", environment=there)
    assert refused.returncode == 1
    assert "generate: expected a prompt of at least one token" in refused.stderr


def test_embed(
    native: Examples, tiny_checkpoint: Path, tmp_path: Path, there: dict[str, str], tensorrt: str
) -> None:
    pytest.importorskip("transformers")
    from encoders import save_embedder

    from edgeattn.pipeline import export
    from edgeattn.recipe import Recipe

    save_embedder(tmp_path / "model", tiny_checkpoint / "tokenizer.json")
    export(tmp_path / "model", Recipe("a100"), tmp_path / "out", verify=False)
    profile = EncoderProfile("any", Range(1, 1, 1), Range(1, 10, 40))
    write_engine(tmp_path / "out", [profile], record={"tensorrt": tensorrt})
    texts = ["a cat", "a kitten", "tax"]
    ids = text(tmp_path / "out", "encode", *texts)
    done = native.start("embed", tmp_path / "out", given=ids, environment=there)
    assert done.returncode == 0, done.stderr
    first, *others = EncoderSession.open(tmp_path / "out").embed(texts)
    nearness = [1.0, *(float(first @ other) for other in others)]
    assert [float(line) for line in done.stdout.split()] == pytest.approx(nearness, abs=1e-3)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function from fields of a library's table to a bundle with such a library."""

    def make(arch: str, machine: str, changed: Mapping[str, object] | None = None) -> Path:
        path = shutil.copytree(tiny_bundle, tmp_path / "bundle")
        folder = path / "plugins" / arch
        folder.mkdir(parents=True)
        library = library_file(folder, table(arch=arch) | dict(changed or {}), machine=machine)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][f"plugins/{arch}/{library.name}"] = {
            "bytes": library.stat().st_size,
            "sha256": hash_file(library),
        }
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return make


def test_without_a_gpu_all_but_the_engine_is_checked(
    examples: Examples, bundle: Callable[..., Path]
) -> None:
    path = bundle(examples.arch, examples.arch)
    done = examples.start("facts", path)
    first, second = done.stdout.splitlines() or [done.stderr, ""]
    assert first.startswith("bundle for jetson-orin-agx-64gb@jetpack6.2, ")
    ops = "RecurrentLinearAttention"
    assert second == f"plugin library for {examples.arch} of ABI {PLUGIN_ABI}: {ops}"
    assert done.returncode == 1
    assert done.stderr.startswith("facts: expected an NVIDIA GPU to run an engine on, but there is")
    assert "there is no libcuda.so.1" in done.stderr
    with (path / "model.onnx").open("r+b") as file:
        file.write(b"\0")
    done = examples.start("facts", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "model.onnx with the sha256 of the manifest" in done.stderr


@pytest.mark.parametrize(
    ("machine", "changed"),
    [
        (platform.machine(), {"abi": PLUGIN_ABI + 1}),
        (platform.machine(), {"arch": "riscv64"}),
        ("aarch64" if platform.machine() == "x86_64" else "x86_64", {}),
    ],
)
def test_libraries_that_do_not_fit_get_pythons_sentences(
    machine: str, changed: dict[str, object], native: Examples, bundle: Callable[..., Path]
) -> None:
    path = bundle(native.arch, machine, changed)
    library = path / "plugins" / native.arch / "libedgeattn_plugins.so"
    with pytest.raises(EdgeattnError) as refusal:
        read_library(library)
    done = native.start("facts", path)
    assert (done.returncode, done.stderr) == (1, f"facts: {refusal.value}\n")
