"""build_on_device.sh: what builds a bundle's engine where there is trtexec and no Python."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import onnx

from edgeattn.bundle import bundle as layout
from edgeattn.bundle.bundle import hash_file
from edgeattn.bundle.writer import BundleWriter
from edgeattn.devices.registry import Target
from edgeattn.encoder_shape import AnyShape
from edgeattn.engine.profiles import AnyProfile, input_shapes, model_profiles
from edgeattn.planner.lowering import Lowering

ENGINE = "trtexec.engine"


def write_device_script(
    writer: BundleWriter,
    target: Target,
    lowering: Lowering,
    shape: AnyShape,
    *,
    library: Path | None,
) -> None:
    """Writes the script, for targets whose engine TensorRT builds on the device.

    A parser that prefers a function's body to the plugin of its name gets a graph without bodies,
    whose weights are those of the other.

    Args:
        writer: of the bundle, with graph and weights in it.
        target: for what.
        lowering: of the graph.
        shape: of the model.
        library: of plugins, in the bundle.
    """
    if target.flavour != "tensorrt" or target.device.gpu is None:
        return
    from jinja2 import Environment, StrictUndefined

    model = layout.MODEL
    if library is not None and target.software.graph.strip_functions:
        model = layout.STRIPPED_MODEL
        _strip_functions(writer.path / layout.MODEL, writer.path / model)
    names = [model, layout.WEIGHTS]
    names += [library.relative_to(writer.path).as_posix()] if library is not None else []
    context = lowering.context or shape.max_context
    profiles = model_profiles(shape, context, lowering.batch, separate=True)
    template = files("edgeattn.pipeline").joinpath(f"{layout.DEVICE_SCRIPT}.j2")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    script = environment.from_string(template.read_text(encoding="utf-8")).render(
        target=target.name,
        device=target.device.description,
        version=target.software.stack.version,
        arch=target.device.gpu.host,
        sm=target.device.gpu.sm,
        sums=[(name, hash_file(writer.path / name)) for name in names],
        model=model,
        library=names[2] if library is not None else None,
        profiles=[_shape_flags(writer.path / model, profile) for profile in profiles],
        engine=ENGINE,
    )
    writer.write(layout.DEVICE_SCRIPT, script)
    (writer.path / layout.DEVICE_SCRIPT).chmod(0o755)


def _strip_functions(model: Path, stripped: Path) -> None:
    proto = onnx.load(model, load_external_data=False)
    del proto.functions[:]
    stripped.write_bytes(proto.SerializeToString())


def _shape_flags(model: Path, profile: AnyProfile) -> list[tuple[str, str]]:
    """What trtexec's --minShapes, --optShapes and --maxShapes take: NAME:1x2,NAME:3x4.

    None where no input has several: it refuses them.
    """
    graph = onnx.load(model, load_external_data=False).graph
    shapes = input_shapes(model, profile)
    dynamic = [value.name for value in graph.input if _is_dynamic(value)]
    if not dynamic:
        return []
    return [
        (bound, ",".join(f"{name}:{'x'.join(map(str, shapes[name][i]))}" for name in dynamic))
        for i, bound in enumerate(("min", "opt", "max"))
    ]


def _is_dynamic(value: onnx.ValueInfoProto) -> bool:
    dimensions = value.type.tensor_type.shape.dim
    return not all(dimension.HasField("dim_value") for dimension in dimensions)
