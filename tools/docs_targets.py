"""A page for every target: its facts, and the commands that are right for it."""

from __future__ import annotations

from collections.abc import Iterator

from docs_reference import cell, shell
from readme_tables import KINDS, table, targets

from edgeattn.cli.targets import fact_rows
from edgeattn.devices.registry import Target, all_devices
from edgeattn.devices.schema import Device

MODEL = "./SmolLM2-135M"


def ordered() -> list[Device]:
    """Every device, Jetsons first, as in the README."""
    return sorted(all_devices(), key=lambda one: (KINDS.index(one.kind), one.sm or 0, one.name))


def overview() -> str:
    """The page that leads to the others."""
    links = "\n".join(f"- [{one.name}]({one.name}.md): {one.description}" for one in ordered())
    return (
        "# Targets\n\nA target is a file of facts, `devices/NAME.toml`; its page here is made from "
        "it. What is said of a target is data from its vendor's documents: nothing was measured "
        f"there by edgeattn.\n\n{links}\n\n{targets()}\n\n"
        "\\* shared with the CPU. **Bold**: the default software. A dtype in parentheses needs "
        "other software.\n"
    )


def page(target: Target) -> str:
    """What is known of a target, and how to get a model onto it."""
    device = target.device
    aliases = ", ".join(f"`{alias}`" for alias in device.aliases)
    parts = [
        f"# {device.name}",
        device.description + (f". Also called {aliases}." if aliases else "."),
        "## Will it fit?",
        shell(
            f"edgeattn doctor {MODEL} --target {device.name}\n"
            f"edgeattn plan {MODEL} --target {device.name} --context 4096"
        ),
        "## Export, on any machine",
        *export(target),
        "## Build",
        *build(target),
        "## Run",
        *run(target),
        "## Facts",
        facts(target),
    ]
    return "\n\n".join(parts) + "\n"


def export(target: Target) -> Iterator[str]:
    """From a checkpoint to a bundle."""
    scheme = "w4a16-spinquant" if target.int4_group_sizes else "w8a8-spinquant"
    lines = [
        f"edgeattn export {MODEL} --target {target.device.name} -o bundle",
        f"edgeattn export {MODEL} --target {target.device.name} --quant w8-rtn -o bundle-w8",
        f"edgeattn export {MODEL} --target {target.device.name} --quant {scheme} "
        "--calibration novel.txt -o bundle-small",
    ]
    yield shell("\n".join(lines))
    others = [name for name in target.device.software.allowed if name != target.software.name]
    default = f"The default software is `{target.software.name}` ({target.software.description})"
    if not others:
        yield f"{default}."
        return
    yield f"{default}. A bundle for other software is another bundle:"
    yield shell(
        "\n".join(
            f"edgeattn export {MODEL} --target {target.device.name}@{name} -o bundle-{name}"
            for name in others
        )
    )


def build(target: Target) -> Iterator[str]:
    """From a bundle to an engine, where there is one."""
    device = target.device
    if device.gpu is None:
        yield "Nothing is built: ONNX Runtime reads the bundle's graph as it is."
        return
    if target.flavour == "tensorrt-rtx":
        yield (
            "TensorRT-RTX builds the engine on any x86-64 machine, without a GPU "
            "(`pip install 'edgeattn[rtx]'`):"
        )
        yield shell("edgeattn build bundle")
        return
    yield "TensorRT builds on the device. There, in a copy of the bundle, or from here over ssh:"
    yield shell("edgeattn build bundle\nedgeattn build bundle --on user@device")
    yield "With nothing but TensorRT's own trtexec on the device, in the bundle's folder:"
    yield shell("sh build_on_device.sh")
    if device.sm == device.nearest_rtx_sm:
        yield "TensorRT-RTX knows this GPU, too, and builds for it on any x86-64 machine:"
        yield shell("edgeattn build bundle --flavour tensorrt-rtx")
    yield (
        "A bundle with edgeattn's own operators brings their plugin library; to build that alone, "
        "on any machine:"
    )
    yield shell(f"edgeattn plugins build --arch {device.gpu.host} --sm {device.sm} -o ./plugins")


def run(target: Target) -> Iterator[str]:
    """What is installed on the device, and what runs there."""
    device = target.device
    yield f"On the device: {installation(target)}"
    if device.gpu is None:
        lines = ['run bundle -p "It is a truth"', "verify bundle", "bench bundle -o here.json"]
    else:
        lines = [
            "verify bundle --backend tensorrt",
            'run bundle --backend tensorrt -p "It is a truth"',
            f"bench bundle --backend tensorrt --device {device.name} -o {device.name}.json",
        ]
    yield shell("\n".join(f"edgeattn {line}" for line in lines))
    yield "In an application: [From checkpoint to app](../embedding.md)."


def installation(target: Target) -> str:
    """The one command that installs edgeattn's runtime there."""
    device = target.device
    if device.gpu is None:
        return "`pip install 'edgeattn[ort]'`. No torch."
    if device.kind == "jetson":
        return "`pip install edgeattn`. JetPack has TensorRT; no torch."
    if device.gpu.host != "x86_64":
        return "`pip install edgeattn`, beside NVIDIA's own TensorRT. No torch."
    extra = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}[target.flavour]
    return f"`pip install 'edgeattn[{extra}]'`. No torch."


def facts(target: Target) -> str:
    """The table of all figures with their sources."""
    rows = (
        (f"`{title}`", "<br>".join(map(cell, values)), cell(source))
        for title, values, source in fact_rows(target)
    )
    return table(("group", "facts", "source"), rows)
