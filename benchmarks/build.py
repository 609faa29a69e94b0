"""What an engine costs to build where its GPU is not: seconds and peak memory per target.

    python benchmarks/build.py [--runs 3] [--model DIR]

SmolLM2-135M in fp16 and w4-rtn, for every GPU TensorRT-RTX knows; whole processes of
`edgeattn build --force`, the bundle exported before. In turn with the first of each scheme runs the
shortest script that builds the same graph, with TensorRT-RTX's own Python API: what edgeattn adds
to it (hashes, checks, record) is the ratio. Writes benchmarks/results/build.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from export import smollm2_fp16
from measure import Usage, run_process, summary, write_result

REPOSITORY = Path(__file__).resolve().parent.parent
PLACE = REPOSITORY / "build" / "benchmarks" / "engines"
GOAL = {"wall_s": 25.0, "peak_rss_mb": 2000.0}  # of w4
CONTEXT = 2048
# target -> schemes; T4 has no int4 kernels
TARGETS = {
    "rtx-4090": ("w4-rtn", "none"),
    "rtx-5090": ("w4-rtn", "none"),
    "a100": ("w4-rtn", "none"),
    "a10": ("w4-rtn", "none"),
    "l4": ("w4-rtn", "none"),
    "dgx-spark": ("w4-rtn", "none"),
    "t4": ("none",),
}


def exported(target: str, quant: str, model: Path) -> Path:
    """The bundle to build, exported once under build/."""
    path = PLACE / f"{target}-{quant}"
    if not (path / "manifest.json").exists():
        command = ["edgeattn", "export", str(model), "--target", target, "--quant", quant]
        command += ["--context", str(CONTEXT), "--no-verify", "-o", str(path), "--force"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return path


def measure(bundle: Path, model: Path, runs: int, *, beside: bool) -> dict[str, Any]:
    """One row of the table.

    Args:
        bundle: to build.
        model: its graph.
        runs: of each.
        beside: run the short script in turn with ours.
    """
    command = ["edgeattn", "build", str(bundle), "--flavour", "tensorrt-rtx", "--force", "--json"]
    ours: list[Usage] = []
    theirs: list[Usage] = []
    for _ in range(runs):
        ours.append(run_process(command))
        if beside:
            theirs.append(run_process([sys.executable, __file__, "--plain", str(model)]))
    (record_file,) = (bundle / "engines").glob("*.engine.json")
    record = json.loads(record_file.read_text())
    row: dict[str, Any] = {
        "sms": record["sms"],
        "engine_bytes": record["bytes"],
        "weight_bytes": (bundle / "model.onnx.data").stat().st_size,
        "layers": record["layers"],
        "builder_peak_rss_mb": record["peak_rss_mb"],
        **summary(ours),
    }
    if theirs:
        row["plain_script"] = summary(theirs)
        row["wall_to_plain_script"] = round(
            row["wall_s"]["median"] / row["plain_script"]["wall_s"]["median"], 3
        )
    return row


def build_plainly(model: str) -> None:
    """What a user writes who has TensorRT-RTX and no edgeattn."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(model)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    sizes = {
        "batch_size": (1, 1, 1),
        "sequence_length": (1, 1, 512),
        "past_sequence_length": (0, CONTEXT // 2 - 1, CONTEXT - 1),
        "total_sequence_length": (1, CONTEXT // 2, CONTEXT + 511),
    }
    for tensor in map(network.get_input, range(network.num_inputs)):
        names = [tensor.get_dimension_name(place) for place in range(len(tensor.shape))]
        shapes = [
            tuple(
                sizes[name][i] if size < 0 else size
                for name, size in zip(names, tensor.shape, strict=True)
            )
            for i in range(3)
        ]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    Path(model).with_name("plain.engine").write_bytes(plan)


def main() -> None:
    """Measures and writes the result; exits 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--plain", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        build_plainly(options.plain)
        return
    model, rows = options.model or smollm2_fp16(), {}
    for target, schemes in TARGETS.items():
        for quant in schemes:
            bundle = exported(target, quant, model)
            rows[f"{target} {quant}"] = row = measure(
                bundle, bundle / "model.onnx", options.runs, beside=target == "rtx-4090"
            )
            wall, memory = row["wall_s"]["median"], row["peak_rss_mb"]["median"]
            print(f"{target} {quant}: {wall:.1f} s, {memory:.0f} MB, {row['engine_bytes']:,} bytes")
    missed = [
        f"{name}: {field} {row[field]['median']}"
        for name, row in rows.items()
        for field, most in GOAL.items()
        if "w4" in name and row[field]["median"] > most
    ]
    write_result("build", {"goal": GOAL, "targets": rows, "missed": missed})
    if missed:
        raise SystemExit("; ".join(missed))


if __name__ == "__main__":
    main()
