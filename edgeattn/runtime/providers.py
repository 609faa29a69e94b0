"""ONNX Runtime on a GPU: its CUDA and TensorRT providers, what they need of graph and options.

None of this has met a GPU yet: it is tried with providers of the CPU under their names.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.bundle.bundle import PLUGINS
from edgeattn.engine.plugins import LIBRARY, plugin_nodes
from edgeattn.engine.profiles import decoder_profiles, input_shapes
from edgeattn.errors import LoweringError, MissingDependencyError, unknown_name
from edgeattn.ops.spec import DOMAIN

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""Names on the command line -> names in ONNX Runtime."""

DEVICES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}
"""Names on the command line -> where a provider's tensors live, as ONNX Runtime calls it."""

# The provider makes every creator of the libraries it loads an operator of this domain.
_PLUGIN_DOMAIN = "trt.plugins"


def provider_chain(
    ort: Any, provider: str, options: Mapping[str, str]
) -> list[str | tuple[str, dict[str, str]]]:
    """The providers of a session: the one asked for, and those that take the rest of a graph.

    Args:
        ort: the module onnxruntime.
        provider: a name in `PROVIDERS`.
        options: of the provider.

    Raises:
        UsageError: the provider is unknown.
        MissingDependencyError: this ONNX Runtime was built without it.
    """
    if provider not in PROVIDERS:
        raise unknown_name("provider", provider, PROVIDERS)
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise MissingDependencyError(
            expected=f"an ONNX Runtime with the provider {provider}",
            came=f"onnxruntime {ort.__version__} here has none",
            todo="pip uninstall onnxruntime, then install edgeattn[gpu] in place of edgeattn[ort]: "
            "both at once overwrite each other",
        )
    if DEVICES[provider] != "cpu" and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # where it says what it does not find
            ort.preload_dlls()  # CUDA's libraries, where they are Python packages
    names = list(PROVIDERS.values())
    behind = names[: names.index(PROVIDERS[provider])][::-1]  # TensorRT's rest goes to CUDA
    return [(PROVIDERS[provider], dict(options)), *behind]


def require_started(session: InferenceSession, provider: str) -> None:
    """Refuses a session that quietly went on without the provider asked for.

    Raises:
        MissingDependencyError: it did.
    """
    if PROVIDERS[provider] not in session.get_providers():
        raise MissingDependencyError(
            expected=f"ONNX Runtime's provider {provider} to start",
            came="it did not, for want of a GPU or of a library",
            todo="check nvidia-smi; pip install 'onnxruntime-gpu[cuda,cudnn]', and TensorRT for "
            "--provider tensorrt",
        )


def provider_options(
    proto: ModelProto, model: Path, provider: str, *, context: int, batch: int
) -> dict[str, str]:
    """Options of a provider for a graph, which is made ready for it.

    TensorRT's is given the sizes, because it otherwise builds an engine for the first it sees, and
    another one for each that is larger: one per token.

    Args:
        proto: the graph, changed in place; its weights stay where they are.
        model: the file it comes from.
        provider: a name in `PROVIDERS`.
        context: most tokens of a row.
        batch: most rows.

    Raises:
        LoweringError: TensorRT asked to run a static cache, whose capacity it wants fixed and ONNX
            Runtime lets grow.
    """
    if provider != "tensorrt":
        return {}
    if any(value.name == "write_indices" for value in proto.graph.input):
        raise LoweringError(
            expected="a bundle with a growing cache for --provider tensorrt",
            came="its cache is static",
            todo="build an engine of it with edgeattn build, or pass --provider cuda",
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "edgeattn")
    options = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache / "onnxruntime-tensorrt"),
        "trt_timing_cache_enable": "True",
    }
    (profile,) = decoder_profiles(context, batch, separate=False)
    shapes = input_shapes(model, profile)
    for place, name in enumerate(("min", "opt", "max")):
        sizes = [f"{n}:{'x'.join(map(str, triple[place]))}" for n, triple in shapes.items()]
        options[f"trt_profile_{name}_shapes"] = ",".join(sizes)
    library = model.parent / PLUGINS / platform.machine() / LIBRARY
    if library.is_file() and plugin_nodes(proto):
        _use_plugins(proto)
        options["trt_extra_plugin_lib_paths"] = str(library.resolve())
    return options


def _use_plugins(proto: ModelProto) -> None:
    """Makes operators of edgeattn those of TensorRT's provider.

    With their function bodies ONNX Runtime would take them apart before the provider sees them.
    Without, nothing knows the types of their outputs, so these are written down.
    """
    import onnx.inliner

    typed = {value.name for value in (*proto.graph.value_info, *proto.graph.output)}
    own = {n for node in proto.graph.node if node.domain == DOMAIN for n in node.output} - typed
    inlined = onnx.inliner.inline_local_functions(proto)
    inferred = onnx.shape_inference.infer_shapes(inlined).graph.value_info
    proto.graph.value_info.extend(value for value in inferred if value.name in own)
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            node.domain = _PLUGIN_DOMAIN
    others = [function for function in proto.functions if function.domain != DOMAIN]
    del proto.functions[:]
    proto.functions.extend(others)
    proto.opset_import.add(domain=_PLUGIN_DOMAIN, version=1)


def widen_boundary(proto: ModelProto, names: Sequence[str]) -> None:
    """Makes inputs and outputs in bf16 ones in fp32, which numpy has and which holds every bf16.

    Args:
        proto: the graph, changed in place.
        names: of the inputs and outputs.
    """
    import onnx

    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    graph, inner = proto.graph, dict[str, str]()
    for value in (*graph.input, *graph.output):
        if value.name in names and value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
            inner[value.name] = f"{value.name}.bf16"
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [inner.get(name, name) for name in ends]
    cast = onnx.helper.make_node
    before = [
        cast("Cast", [value.name], [inner[value.name]], to=narrow)
        for value in graph.input
        if value.name in inner
    ]
    after = [
        cast("Cast", [inner[value.name]], [value.name], to=wide)
        for value in graph.output
        if value.name in inner
    ]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def run_bound(
    session: InferenceSession, outputs: Sequence[str], values: Mapping[str, Any], device: str
) -> list[Any]:
    """Runs a session whose cache stays on a device.

    Args:
        session: of a decoder.
        outputs: to give; the logits come to the CPU.
        values: ONNX Runtime's tensors by name of the input, wherever they are.
        device: "cuda" or "cpu", where all other outputs stay.

    Returns:
        ONNX Runtime's tensors, in the order of `outputs`.
    """
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, "cpu" if name == "logits" else device)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    found: list[Any] = binding.get_outputs()
    return found
