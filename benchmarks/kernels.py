"""The Triton kernels on a GPU: time, share of what the device can do, and fla beside them.

    python benchmarks/kernels.py

Times are medians of device events. "Can do" is measured in the same run: a copy for kernels bound
by memory, a large product in fp16 for those bound by arithmetic. fla (flash-linear-attention) is
measured where it is installed, its figures are None else; for fast-hadamard-transform, where it is
missing, a product with the whole matrix stands in. Needs an NVIDIA GPU; writes
benchmarks/results/kernels.json.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from measure import device_seconds as seconds
from measure import write_result
from torch import Tensor

from edgeattn.kernels.bidirectional_linear_attention import bidirectional_linear_attention
from edgeattn.kernels.hadamard_transform import hadamard_transform
from edgeattn.kernels.recurrent_linear_attention import recurrent_linear_attention
from edgeattn.quant.hadamard import hadamard_factors

# What a figure may be at most: our time over another's.
MOST = {
    "prefill over fla": 1.0,
    "lion over softmax attention": 1.0,
    "lion over two passes of fla": 1.3,
}
# What it must be at least: the share of a copy's bandwidth.
LEAST = {
    "decode share of copy": 0.75,
    "hadamard 4096 share of copy": 0.7,
    "hadamard 14336 share of copy": 0.7,
}
LION = {"batch": 4, "heads": 16, "length": 4096, "width": 64}
HADAMARD_ROWS = 16384
PREFILL = {"batch": 4, "heads": 16, "length": 8192, "width": 64}
DECODE = {"batch": 1024, "heads": 16, "length": 1, "width": 64}


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


def lion() -> dict[str, Any]:
    """Bidirectional, one decay per head and row, beside torch's softmax attention."""
    tensors = inputs(**LION)
    q, k, v = (torch.nn.functional.normalize(x.abs(), dim=-1) for x in tensors[:3])
    decay = tensors[3].squeeze(-1)
    padding = torch.zeros(LION["batch"], LION["length"], dtype=torch.int32, device="cuda")
    ours = seconds(lambda: bidirectional_linear_attention(q, k, v, decay, padding))
    softmax = seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    one_pass = fla_prefill([q, k, v, tensors[3]])
    return {
        "seconds": ours,
        "softmax_attention_seconds": softmax,
        "fla_seconds": one_pass,
        "over_softmax_attention": ours / softmax,
        "over_two_passes_of_fla": ours / (2 * one_pass) if one_pass else None,
    }


def hadamard(width: int, bandwidth: float) -> dict[str, Any]:
    """Rows of one width, beside fast-hadamard-transform or, without it, a product with a matrix."""
    factors = hadamard_factors(width)
    left, right = (f.to("cuda", torch.float16) for f in (factors.left, factors.right))
    x = torch.randn(HADAMARD_ROWS, width, dtype=torch.float16, device="cuda")
    ours = seconds(lambda: hadamard_transform(x, left, right))
    if find_spec("fast_hadamard_transform") is not None and width & (width - 1) == 0:
        from fast_hadamard_transform import hadamard_transform as fast

        peer, theirs = "fast-hadamard-transform", seconds(lambda: fast(x, width**-0.5))
    else:
        dense = torch.kron(left, right) / width**0.5
        peer, theirs = "a product with the matrix", seconds(lambda: x @ dense)
    return {
        "seconds": ours,
        "peer": peer,
        "peer_seconds": theirs,
        "share_of_copy": 2 * x.numel() * x.element_size() / ours / bandwidth,
    }


def main() -> None:
    """Measures all kernels and writes the result."""
    if not torch.cuda.is_available():
        raise SystemExit("kernels.py needs an NVIDIA GPU, and torch finds none")
    bandwidth, rate = copy_bandwidth(), product_rate()
    found = {"prefill": prefill(rate), "decode": decode(bandwidth), "lion": lion()}
    found |= {f"hadamard {width}": hadamard(width, bandwidth) for width in (4096, 14336)}
    figures = {
        f"{kernel} {figure.replace('_', ' ')}": value
        for kernel, values in found.items()
        for figure, value in values.items()
    }
    missed = [n for n, most in MOST.items() if figures[n] is not None and figures[n] > most]
    missed += [name for name, least in LEAST.items() if figures[name] < least]
    content = {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_s": bandwidth,
        "product_operations_s": rate,
        "shapes": {"prefill": PREFILL, "decode": DECODE, "lion": LION, "rows": HADAMARD_ROWS},
        "results": found,
        "goals": {"at most": MOST, "at least": LEAST},
        "missed": missed,
    }
    write_result("kernels", content)
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
