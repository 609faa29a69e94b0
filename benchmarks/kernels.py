"""The Triton kernels on a GPU: time, share of what the device can do, and fla beside them.

    python benchmarks/kernels.py

Times are medians of device events. "Can do" is measured in the same run: a copy for kernels bound
by memory, a large product in fp16 for those bound by arithmetic. fla (flash-linear-attention) is
measured where it is installed, its figures are None else. Needs an NVIDIA GPU; writes
benchmarks/results/kernels.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from measure import write_result
from torch import Tensor

from edgeattn.kernels.recurrent_linear_attention import recurrent_linear_attention

# Our time over fla's, and the share of copy bandwidth.
GOALS = {"prefill_over_fla": 1.0, "decode_share_of_copy": 0.75}
PREFILL = {"batch": 4, "heads": 16, "length": 8192, "width": 64}
DECODE = {"batch": 1024, "heads": 16, "length": 1, "width": 64}


def seconds(run: Callable[[], object], repetitions: int = 50) -> float:
    """Median over repetitions, the caches of the device emptied before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repetitions + 5):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[5:])


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def product_rate() -> float:
    """fp16 operations per second of a product of two 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b, 20)


def inputs(batch: int, heads: int, length: int, width: int) -> list[Tensor]:
    """q, k, v, log_decay, beta, state and normaliser as the operator takes them."""
    rows = (batch, heads, length)
    q, k, v = (torch.randn(*rows, width, dtype=torch.float16, device="cuda") for _ in range(3))
    log_decay = -torch.nn.functional.softplus(torch.randn(*rows, 1, device="cuda"))
    beta = torch.ones(*rows, device="cuda")
    state = torch.zeros(batch, heads, width, width, device="cuda")
    return [q, k, v, log_decay, beta, state, torch.zeros(batch, heads, width, device="cuda")]


def fla_prefill(tensors: list[Tensor]) -> float | None:
    """chunk_simple_gla on the same tensors in its own layout."""
    if find_spec("fla") is None:
        return None
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors[:3])
    g = tensors[3].squeeze(-1).transpose(1, 2).contiguous()
    return seconds(lambda: chunk_simple_gla(q, k, v, g, output_final_state=True))


def fla_decode(tensors: list[Tensor]) -> float | None:
    """fused_recurrent_simple_gla, one row."""
    if find_spec("fla") is None:
        return None
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors[:3])
    g = tensors[3].squeeze(-1).transpose(1, 2).contiguous()
    state = tensors[5]
    return seconds(
        lambda: fused_recurrent_simple_gla(q, k, v, g, initial_state=state, output_final_state=True)
    )


def prefill(rate: float) -> dict[str, Any]:
    """Chunked, one decay per head; operations as the formula in chunks of 64 has them."""
    tensors = inputs(**PREFILL)
    ours, theirs = seconds(lambda: recurrent_linear_attention(*tensors)), fla_prefill(tensors)
    rows = PREFILL["batch"] * PREFILL["heads"] * PREFILL["length"]
    operations = rows * 2 * PREFILL["width"] * (2 * 64 + 2 * PREFILL["width"])
    return {
        "seconds": ours,
        "fla_seconds": theirs,
        "over_fla": ours / theirs if theirs else None,
        "share_of_product": operations / ours / rate,
    }


def decode(bandwidth: float) -> dict[str, Any]:
    """One row; the state read and written is nearly all that moves."""
    tensors = inputs(**DECODE)
    ours, theirs = seconds(lambda: recurrent_linear_attention(*tensors)), fla_decode(tensors)
    state = tensors[5]
    moved = 2 * state.numel() * 4 + sum(x.numel() * x.element_size() for x in tensors[:5])
    return {
        "seconds": ours,
        "fla_seconds": theirs,
        "over_fla": ours / theirs if theirs else None,
        "share_of_copy": moved / ours / bandwidth,
    }


def main() -> None:
    """Measures both and writes the result."""
    if not torch.cuda.is_available():
        raise SystemExit("kernels.py needs an NVIDIA GPU, and torch finds none")
    bandwidth, rate = copy_bandwidth(), product_rate()
    found = {"prefill": prefill(rate), "decode": decode(bandwidth)}
    over, share = found["prefill"]["over_fla"], found["decode"]["share_of_copy"]
    missed = []
    if over is not None and over > GOALS["prefill_over_fla"]:
        missed.append("prefill_over_fla")
    if share < GOALS["decode_share_of_copy"]:
        missed.append("decode_share_of_copy")
    content = {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_s": bandwidth,
        "product_operations_s": rate,
        "shapes": {"prefill": PREFILL, "decode": DECODE},
        "results": found,
        "goals": GOALS,
        "missed": missed,
    }
    write_result("kernels", content)
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
