"""Writes the README's tables from the data they describe and from measured results: make readme."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgeattn.devices.registry import Target, all_devices, all_targets, parse_target
from edgeattn.devices.schema import Device
from edgeattn.models.encoder_families import ENCODER_FAMILIES, EncoderFamily
from edgeattn.models.families import FAMILIES, Family
from edgeattn.ops import ALL_OPS
from edgeattn.ops.spec import OpSpec
from edgeattn.recurrent import Rule

README = Path(__file__).resolve().parent.parent / "README.md"
RESULTS = README.parent / "benchmarks" / "results"
KINDS = ("jetson", "datacenter", "workstation", "geforce", "cpu")
ENGINES = {
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
    "onnxruntime": "ONNX Runtime",
}


def families() -> str:
    """Every family: what it is called, what sets it apart from Llama, and how it is read."""
    rows = (
        (f"`{family.name}`", family.examples, special(family), yes(family.gguf_architecture))
        for family in FAMILIES.values()
    )
    return table(("`model_type`", "known as", "beyond Llama", "GGUF"), rows)


def encoders() -> str:
    """Every family of encoders: what it is called, reads and is made of."""
    rows = (
        (
            f"`{family.name}`",
            family.examples,
            "images" if family.reads_images else "text",
            layers(family),
            "yes" if family.head else "no",
        )
        for family in ENCODER_FAMILIES.values()
    )
    return table(("`model_type`", "known as", "reads", "layers", "classification"), rows)


def layers(family: EncoderFamily) -> str:
    """How the blocks of a family of encoders are made."""
    features = (
        (True, "RMSNorm" if family.norm == "rms" else "LayerNorm"),
        (True, "before attention and MLP" if family.pre_norm else "behind each sum"),
        (family.rope, "RoPE"),
        (family.gated, "gated MLP"),
        (family.layer_scale, "LayerScale"),
    )
    first, second, *rest = [text for has, text in features if has]
    return ", ".join((f"{first} {second}", *rest))


def special(family: Family) -> str:
    """What the decoder does for this family and not for Llama."""
    features = (
        (family.full_attention_period is not None, windows(family.full_attention_period or 0)),
        (family.local_rope, "other rope under the window"),
        (family.skips_rope, "layers without rope (NoPE)"),
        (family.qkv_bias, "biases on q, k, v"),
        (family.qk_norm, "norms on q and k"),
        (family.output_gate, "a gate on what attention gives"),
        (family.rule is not None, linear(family.rule)),
        (family.output_norms, "norms behind attention and MLP"),
        (family.softcaps, "soft caps, where the config has them"),
        (family.scaled_embedding, "scaled embedding"),
        (bool(family.fused), "weights stored fused"),
    )
    return "; ".join(text for has, text in features if has) or "–"


def linear(rule: Rule | None) -> str:
    """Which linear attention a family has."""
    if rule == "gated":
        return "gated linear attention in every layer"
    return "Gated DeltaNet in most layers"


def windows(period: int) -> str:
    """Which layers have a sliding window."""
    if period == 0:
        return "sliding window, where the config has one"
    return f"sliding window, but in each {period}{'nd' if period == 2 else 'th'} layer"


def targets() -> str:
    """Every target with its software, Jetsons first."""
    devices = sorted(all_devices(), key=lambda d: (KINDS.index(d.kind), d.sm or 0, d.name))
    titles = ("target (aliases)", "SM", "memory", "GB/s", "software", "engine", "dtypes", "int4")
    return table(titles, (target_row(device) for device in devices))


def target_row(device: Device) -> tuple[str, ...]:
    """One line of the table of targets."""
    default = parse_target(device.name)
    others = sorted(name for name in device.software.allowed if name != default.software.name)
    memory = device.memory
    aliases = f" ({', '.join(f'`{alias}`' for alias in device.aliases)})" if device.aliases else ""
    return (
        f"`{device.name}`{aliases}",
        str(device.sm or "–"),
        f"{memory.total_gb:g} GB{'*' if memory.shared_with_cpu else ''}" if memory else "–",
        f"{memory.bandwidth_gb_s:,g}" if memory else "–",
        ", ".join([f"**{default.software.name}**", *others]),
        ENGINES[default.flavour],
        dtypes(default),
        yes(default.int4_group_sizes),
    )


def dtypes(default: Target) -> str:
    """The preferred dtype first; in parentheses those that only other software takes."""
    of_default = sorted(default.dtypes, key=lambda d: (d != default.preferred_dtype, d))
    stacks = [t for t in all_targets() if t.device == default.device]
    further = sorted({d for t in stacks for d in t.dtypes} - set(of_default))
    return ", ".join([*of_default, *(f"({d})" for d in further)])


def schemes() -> str:
    """Every measured scheme, the best first; from benchmarks/results/quantize.json."""
    results = json.loads((RESULTS / "quantize.json").read_text("utf-8"))["results"]
    ordered = sorted(results.items(), key=lambda item: item[1]["perplexity"])
    titles = ("scheme", "perplexity", "weights", "export, wall", "peak memory")
    return table(titles, (scheme_row(name, found) for name, found in ordered))


def scheme_row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table of schemes; a peer has its perplexity alone."""
    perplexity = f"{found['perplexity']:.2f}"
    if "wall_s" not in found:
        return name, perplexity, "", "", ""
    kept = found["transforms"].get("kept at higher precision", {}).get("linears")
    beside = f" ({kept} linear layers kept)" if kept else ""
    size, peak = f"{found['weight_mb']:.0f} MB", f"{found['peak_rss_mb']:,.0f} MB"
    return f"`{name}`{beside}", perplexity, size, f"{found['wall_s']:,.0f} s", peak


def variants() -> str:
    """What each attention variant costs and gives; from benchmarks/results/attention.json."""
    rows = json.loads((RESULTS / "attention.json").read_text("utf-8"))["rows"]
    titles = (
        "SmolLM2-135M with",
        "weights",
        "perplexity",
        "tokens/s here",
        "tokens/s on a Jetson AGX Orin, predicted",
    )
    return table(titles, (variant_row(name, found) for name, found in rows.items()))


def variant_row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table of variants."""
    size, rate = found["weight_bytes"] / 1e6, found["predicted_jetson_orin_tokens_per_s"]
    return (
        name,
        f"{size:,.0f} MB",
        f"{found['perplexity']:.2f}",
        f"{found['cpu_tokens_per_s']:.1f}",
        f"{rate:,.0f}" if rate else "not known",
    )


def minilm() -> str:
    """What schemes cost a sentence encoder; from benchmarks/results/minilm.json."""
    results = json.loads((RESULTS / "minilm.json").read_text("utf-8"))["results"]
    titles = ("scheme", "weights", "mean cosine with fp32", "same nearest paragraph")
    rows = (
        (
            f"`{name}`",
            f"{found['weight_bytes'] / 1e6:.1f} MB",
            f"{found['cosine']:.4f}",
            f"{found['top1']:.1%}",
        )
        for name, found in results.items()
    )
    return table(titles, rows)


def lion() -> str:
    """What distilling a sentence encoder to LION-D keeps, and what it buys; from lion.json."""
    found = json.loads((RESULTS / "lion.json").read_text("utf-8"))
    kept, seconds = found["agreement"], found["seconds"]["random, with rotary positions"]
    lengths = [length for length in seconds["softmax"] if int(length) >= 512]
    rows = ((name, *(f"{seconds[name][n]:.2f} s" for n in lengths)) for name in seconds)
    first = found["LION-D is faster from (tokens)"]["random, with rotary positions"]
    return (
        f"After {found['steps']} steps all-MiniLM-L6-v2 as LION-D gives vectors of a mean cosine "
        f"of {kept['cosine, mean']:.2f} with its own, and the\nsame nearest of "
        f"{kept['paragraphs']} paragraphs for {kept['same nearest paragraph']:.0%}: longer "
        f"training is needed before it is of use. Of a random encoder\nof its size with rotary "
        f"positions, LION-D is faster from about {first:,} tokens on this CPU:\n\n"
        + table(("tokens", *(f"{int(n):,}" for n in lengths)), rows)
    )


def operators() -> str:
    """Every operator of domain edgeattn and what implements it."""
    titles = ("operator", "inputs", "outputs", "Triton kernel", "TensorRT plugin")
    return table(titles, (operator_row(spec) for spec in ALL_OPS))


def operator_row(spec: OpSpec) -> tuple[str, ...]:
    """One line of the table of operators."""
    sides = (" ".join(f"`{t.name}`" for t in side) for side in (spec.inputs, spec.outputs))
    return f"`{spec.name}`", *sides, yes(spec.triton), yes(spec.plugin)


def yes(value: object) -> str:
    """A table's word for whether there is something."""
    return "yes" if value else "no"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def updated(text: str) -> str:
    """The README with its generated parts written anew.

    Raises:
        ValueError: the marks of a part are missing.
    """
    parts = {
        "encoders": encoders(),
        "families": families(),
        "targets": targets(),
        "schemes": schemes(),
        "operators": operators(),
        "variants": variants(),
        "minilm": minilm(),
        "lion": lion(),
    }
    for name, content in parts.items():
        first, last = f"<!-- {name}: generated by make readme -->\n", f"\n<!-- end of {name} -->"
        before, start, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not start or not end:
            raise ValueError(f"README.md has no part marked {first.strip()} … {last.strip()}")
        text = before + first + content + last + after
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
