"""A small Gated DeltaNet decoder from training to a running bundle, beside its softmax twin.

    python benchmarks/recurrent.py TEXT JUDGED [--minutes 5] [--threads 2]

Trains a Qwen3.5 (text) of transformers whose four layers are all linear attention on the bytes of
TEXT, exports it for a CPU and reads windows of JUDGED with transformers and with the bundle. Then
state and speed against the length of the text, beside a Qwen3 of the same widths with random
weights, whose graph writes its cache in place. Threads are ONNX Runtime's; the machine is shared.
Writes benchmarks/results/recurrent.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measure import write_result

from edgeattn.pipeline import export
from edgeattn.recipe import Recipe
from edgeattn.runtime import Session
from edgeattn.text_file import read_text

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA = {
    "layer_types": ["linear_attention"] * 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
WINDOW, BATCH, RATE, WARM = 256, 8, 3e-3, 20
JUDGED_WINDOWS = 24
LENGTHS = (128, 1024, 4096)
PIECE, TIMED, REPEATS = 512, 48, 3


def byte_tokenizer() -> str:
    """A tokenizer.json whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text: str = tokenizer.to_str()
    return text


def token_ids(tokenizer_json: str, file: Path) -> torch.Tensor:
    """The tokens of a text."""
    from tokenizers import Tokenizer

    return torch.tensor(Tokenizer.from_str(tokenizer_json).encode(read_text(file)).ids)


def train(ids: torch.Tensor, minutes: float) -> tuple[Any, dict[str, Any]]:
    """A model trained on windows drawn from `ids` for so long, and how that went."""
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SIZES, **DELTA))
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    offsets, losses = torch.arange(WINDOW), []
    start, budget = time.monotonic(), 60 * minutes
    while (spent := time.monotonic() - start) < budget:
        for group in optimiser.param_groups:
            fade = 0.5 * (1 + math.cos(math.pi * spent / budget))
            group["lr"] = RATE * min(1, (len(losses) + 1) / WARM) * fade
        rows = ids[torch.randint(len(ids) - WINDOW, (BATCH, 1)) + offsets]
        loss = model(rows, labels=rows, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss))
        if len(losses) % 20 == 1:
            print(f"{spent:5.0f} s, step {len(losses)}: {losses[-1]:.3f} nats", flush=True)
    about = {
        "minutes": minutes,
        "steps": len(losses),
        "tokens": len(losses) * BATCH * WINDOW,
        "loss of the last 20 steps": round(statistics.mean(losses[-20:]), 4),
    }
    return model.eval(), about


def bundle_of(model: Any, tokenizer_json: str, folder: Path) -> Session:
    """A model of transformers, exported, proven and opened."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    model.save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    report = export(checkpoint, Recipe("cpu"), bundle)
    assert report.verification is not None
    return Session.open(bundle, threads=torch.get_num_threads())


def losses(logits: torch.Tensor, rows: torch.Tensor) -> float:
    """Mean loss of the tokens that are predicted, in nats."""
    flat = logits[:, :-1].flatten(0, 1).double()
    return float(torch.nn.functional.cross_entropy(flat, rows[:, 1:].flatten()))


@torch.inference_mode()
def quality(model: Any, session: Session, ids: torch.Tensor) -> dict[str, float]:
    """Perplexity by byte of the same windows, in torch and in ONNX Runtime."""
    rows = ids[: JUDGED_WINDOWS * WINDOW].reshape(JUDGED_WINDOWS, WINDOW)
    theirs = model(rows, use_cache=False).logits
    ours = torch.from_numpy(np.array(session.run(rows.numpy()).logits))
    return {
        "transformers": round(math.exp(losses(theirs, rows)), 4),
        "bundle in ONNX Runtime": round(math.exp(losses(ours, rows)), 4),
        "largest difference of a logit": float((theirs - ours).abs().max()),
    }


def by_length(session: Session) -> dict[str, dict[str, float]]:
    """State, seconds of the prompt and decoded tokens per second, by tokens of the prompt."""
    found = {}
    for length in LENGTHS:
        ids = np.random.default_rng(0).integers(3, 256, (1, length + TIMED))
        prompts, steps = [], []
        for _ in range(REPEATS):
            state, start = None, time.perf_counter()
            for begin in range(0, length, PIECE):
                state = session.run(ids[:, begin : min(begin + PIECE, length)], state).state
            prompts.append(time.perf_counter() - start)
            times = []
            for place in range(length, length + TIMED):
                start = time.perf_counter()
                state = session.run(ids[:, place : place + 1], state).state
                times.append(time.perf_counter() - start)
            steps.append(statistics.median(times))
        found[str(length)] = {
            "state_kb": round(session.cache_bytes(state) / 1e3, 1),
            "prompt_tokens_per_s": round(length / min(prompts), 1),
            "decoded_tokens_per_s": round(1 / min(steps), 1),
        }
        print(length, found[str(length)], flush=True)
    return found


def main() -> None:
    """Trains, exports, measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("judged", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = byte_tokenizer()
    model, training = train(token_ids(tokenizer, arguments.text), arguments.minutes)
    print(json.dumps(training))
    torch.manual_seed(1)
    twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).eval()
    with tempfile.TemporaryDirectory() as folder:
        session = bundle_of(model, tokenizer, Path(folder) / "recurrent")
        softmax = bundle_of(twin, tokenizer, Path(folder) / "softmax")
        result = {
            "model": "Qwen3.5 (text), 4 layers of Gated DeltaNet, hidden 128, 4 heads of 32, bytes",
            "parameters": model.num_parameters(),
            "texts": [arguments.text.name, arguments.judged.name],
            "training": training,
            "threads": arguments.threads,
            "onnxruntime": version("onnxruntime"),
            "perplexity per byte": quality(model, session, token_ids(tokenizer, arguments.judged)),
            "by tokens of the prompt": by_length(session),
            "softmax twin": {
                "parameters": twin.num_parameters(),
                "by tokens of the prompt": by_length(softmax),
            },
        }
    write_result("recurrent", result)


if __name__ == "__main__":
    main()
