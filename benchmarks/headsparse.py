"""Decoding with few heads on a GPU, beside the same kernel with all heads and torch's attention.

    python benchmarks/headsparse.py

32 heads of 128 numbers in fp16, each with keys and values of its own, caches of 2,048 to 8,192
tokens. Another random set of heads is active in each row. Times are medians of device events, the
device's caches emptied before each. At batch 1 the weights of a layer of a 7B model, which a step
reads too, hide the gain; the bandwidth model of `edgeattn.planner.head_sparsity` is shown beside.
Needs an NVIDIA GPU; writes benchmarks/results/headsparse.json.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import device_seconds as seconds
from measure import write_result
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from edgeattn.kernels.head_sparse_attention import head_sparse_attention
from edgeattn.planner.head_sparsity import cache_share, decode_speedup

BATCH, HEADS, WIDTH = 64, 32, 128
CONTEXTS, DENSITIES = (2048, 4096, 8192), (0.3, 0.5, 0.625)
# Speed-up over our dense kernel at 8,192 tokens, on the device of the goals.
GOALS = {0.3: 2.9, 0.5: 1.8}
GOALS_DEVICE = "NVIDIA H100"
# Of a layer with 4,096 channels and an MLP of 11,008: what a step reads besides.
WEIGHTS = 4 * 4096**2 + 3 * 4096 * 11008


def caches(batch: int, context: int) -> list[Tensor]:
    """Queries `[B, H, 1, D]`, keys and values `[B, H, S, D]`."""
    shape = (batch, HEADS, context, WIDTH)
    q = torch.randn(batch, HEADS, 1, WIDTH, dtype=torch.float16, device="cuda")
    return [q, *(torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2))]


def sparse_seconds(tensors: list[Tensor], density: float) -> float:
    """Our kernel; with density 1 all heads are listed."""
    q, k, v = tensors
    batch, context = len(q), k.shape[2]
    slots = int(density * HEADS)
    index = torch.rand(batch, HEADS, device="cuda").argsort(-1)[:, :slots].to(torch.int32)
    ones = torch.ones(HEADS, device="cuda")
    filled = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    y, wrong = head_sparse_attention(q, k, v, ones, ones, index.contiguous(), filled)
    _check(y, wrong, tensors, index)
    return seconds(lambda: head_sparse_attention(q, k, v, ones, ones, index, filled))


def _check(y: Tensor, wrong: Tensor, tensors: list[Tensor], index: Tensor) -> None:
    """Timings of wrong numbers are worth nothing."""
    expected = scaled_dot_product_attention(*tensors)
    active = torch.zeros(expected.shape[:2], dtype=torch.bool, device="cuda")
    active.scatter_(1, index.long(), value=True)
    expected = expected * active[:, :, None, None]
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-3)
    assert not wrong.any()


def decode(context: int) -> dict[str, Any]:
    """Many rows: the cache is nearly all that moves."""
    tensors = caches(BATCH, context)
    dense = sparse_seconds(tensors, 1.0)
    softmax = seconds(lambda: scaled_dot_product_attention(*tensors))
    found: dict[str, Any] = {"dense_seconds": dense, "torch_seconds": softmax}
    for density in DENSITIES:
        ours = sparse_seconds(tensors, density)
        found[f"density {density}"] = {
            "seconds": ours,
            "over_dense": dense / ours,
            "over_torch": softmax / ours,
        }
    return found


def one_row(context: int) -> dict[str, Any]:
    """A single row beside the weights of its layer."""
    tensors = caches(1, context)
    matrix = torch.randn(WEIGHTS // 4096, 4096, dtype=torch.float16, device="cuda")
    vector = torch.randn(4096, 1, dtype=torch.float16, device="cuda")
    weights, dense = seconds(lambda: matrix @ vector), sparse_seconds(tensors, 1.0)
    share = cache_share(2 * WEIGHTS, 2 * 2 * HEADS * WIDTH, context, 1)
    found: dict[str, Any] = {"weights_seconds": weights, "dense_seconds": dense}
    for density in DENSITIES:
        ours = sparse_seconds(tensors, density)
        found[f"density {density}"] = {
            "speedup": (weights + dense) / (weights + ours),
            "predicted_at_most": decode_speedup(share, density),
        }
    return found


def main() -> None:
    """Measures all contexts and writes the result."""
    if not torch.cuda.is_available():
        raise SystemExit("headsparse.py needs an NVIDIA GPU, and torch finds none")
    device = torch.cuda.get_device_name()
    many = {f"{context} tokens": decode(context) for context in CONTEXTS}
    longest = many[f"{CONTEXTS[-1]} tokens"]
    missed = [
        f"density {density}"
        for density, goal in GOALS.items()
        if device.startswith(GOALS_DEVICE) and longest[f"density {density}"]["over_dense"] < goal
    ]
    content = {
        "device": device,
        "torch": torch.__version__,
        "shapes": {"batch": BATCH, "heads": HEADS, "width": WIDTH, "dtype": "fp16"},
        "results": many,
        "one row": {f"{context} tokens": one_row(context) for context in CONTEXTS},
        "goals": {"device": GOALS_DEVICE, "over_dense at 8192 tokens": GOALS},
        "missed": missed,
    }
    write_result("headsparse", content)
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
