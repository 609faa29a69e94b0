"""How polynomial attention grows with its input, and from where on it is faster than softmax.

    python benchmarks/longcontext.py

One causal head: torch's scaled_dot_product_attention beside polynomial sums by features (degree 1
and 2) and by FFT (`edgeattn.ops.polynomial_sums`), for 64 and 16 coordinates and 64 values. On a
GPU where there is one: there the features are those of `edgeattn::FftRopeAttention`'s kernels, in
fp16 with 32 heads; else on this CPU in fp32. Every time is the least of several runs; a form that
takes longer than a limit is not measured at greater lengths. The predicted crossover is that of
FLOPs (`edgeattn.planner.polynomial`); the measured one lies between two lengths.

This is what one head costs by itself, not what a model gains: most heads of a trained model do not
take a polynomial (benchmarks/polynomial_heads.py). Needs edgeattn[export,kernels,report]. Writes
benchmarks/results/longcontext.json and longcontext.svg.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from measure import RESULTS, write_result
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from edgeattn.ops.polynomial_sums import (
    factorised,
    multisets,
    plain_symbols,
    toeplitz_fft,
)
from edgeattn.planner.polynomial import crossover

LENGTHS = tuple(2**n for n in range(10, 17))
WIDTHS, VALUES = (64, 16), 64
# Seconds: longer ones are not repeated at greater lengths.
LIMIT = 20.0
# Products of matrices and FFTs of the CPU; features beyond these are too many for FFTs.
MOST_FFT_FEATURES = 200
SOFTMAX = "softmax"
GPU = torch.cuda.is_available()
GOALS = {"cpu": 8192, "NVIDIA H100": 16384}
TAYLOR = (1.0, 1.0, 0.5)

Times = dict[int, float]


@dataclass(frozen=True)
class Inputs:
    """One head, or as many as a GPU needs, `[1, H, T, D]` and `[1, H, T, 64]`."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, length: int, width: int) -> Inputs:
        """Normal numbers, such that scores have a spread of a quarter."""
        torch.manual_seed(0)
        heads, place = (32, {"device": "cuda", "dtype": torch.float16}) if GPU else (1, {})
        q, k, v = (torch.randn(1, heads, length, d, **place) for d in (width, width, VALUES))  # type: ignore[arg-type]
        return cls(q / 2, k / 2, v)


def softmax(x: Inputs) -> Tensor:
    """Exact attention."""
    return scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)


def by_features(x: Inputs, degree: int) -> Tensor:
    """Sums over keys as states."""
    if GPU:
        return _kernels(x, degree)
    u = torch.cat((x.v, torch.ones_like(x.v[..., :1])), dim=-1)
    series = x.q.new_tensor([TAYLOR[: degree + 1]])
    sums = factorised(x.q / math.sqrt(x.q.shape[-1]), x.k, u, series, causal=True)
    return sums[..., :-1] / sums[..., -1:]


def _kernels(x: Inputs, degree: int) -> Tensor:
    """All keys far, no bias, in edgeattn's kernels; values have the width of queries there."""
    from edgeattn.ops.torch_ops import TORCH_OPS

    heads, length, width = x.q.shape[1:]
    tables = {"device": x.q.device, "dtype": torch.float32}
    series = torch.tensor([TAYLOR[: degree + 1]], **tables).repeat(heads, 1)  # type: ignore[arg-type]
    numbers = torch.tensor([length], device=x.q.device, dtype=torch.int32)
    y: Tensor = TORCH_OPS["FftRopeAttention"](
        x.q,
        x.k,
        x.v[..., :width].contiguous(),
        series,
        torch.zeros(heads, width, **tables),  # type: ignore[arg-type]
        torch.zeros(1, 1, **tables),  # type: ignore[arg-type]
        torch.full((heads,), 1e3 if degree == 2 else 0.9, **tables),  # type: ignore[arg-type]
        torch.ones(heads, device=x.q.device, dtype=torch.int32),
        numbers,
        degree=degree,
        row_centre=0,
        impl="triton",
    )[0]
    return y


def by_fft(x: Inputs, degree: int) -> Tensor:
    """Sums over keys as products with Toeplitz matrices."""
    length = x.q.shape[-2]
    u = torch.cat((x.v, torch.ones_like(x.v[..., :1])), dim=-1)
    offsets = torch.arange(-(length - 1), length, device=x.q.device)
    causal = (offsets >= 0).to(x.q.dtype)
    symbols = plain_symbols(x.q.shape[-1], causal)
    series = x.q.new_tensor([TAYLOR[: degree + 1]])
    scaled = x.q / math.sqrt(x.q.shape[-1])
    sums = toeplitz_fft(scaled, x.k, u, series, causal, symbols)
    return sums[..., :-1] / sums[..., -1:]


def forms(width: int) -> dict[str, Callable[[Inputs], Tensor]]:
    """What is measured at a width, softmax first."""
    found: dict[str, Callable[[Inputs], Tensor]] = {SOFTMAX: softmax}
    for degree in (1, 2):
        found[f"degree {degree}"] = lambda x, degree=degree: by_features(x, degree)  # type: ignore[misc]
        if not GPU and len(multisets(width, degree)) <= MOST_FFT_FEATURES:
            found[f"degree {degree}, FFT"] = lambda x, degree=degree: by_fft(x, degree)  # type: ignore[misc]
    return found


def seconds(run: Callable[[Inputs], Tensor], x: Inputs) -> float:
    """The least of some runs, the first of which makes ready."""
    found: list[float] = []
    for _ in range(6):
        _wait()
        start = time.perf_counter()
        run(x)
        _wait()
        found.append(time.perf_counter() - start)
        if sum(found) > LIMIT / 2:
            break
    return min(found[1:] or found)


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def check(x: Inputs, width: int) -> None:
    """Forms of one degree give the same numbers, and those of degree 2 are near softmax's."""
    outputs = {name: run(x).float() for name, run in forms(width).items()}
    for name, y in outputs.items():
        if (alike := name.removesuffix(", FFT")) != name:
            torch.testing.assert_close(y, outputs[alike], rtol=1e-3, atol=1e-3)
    exact, near = outputs[SOFTMAX], outputs["degree 2"]
    error = float((near - exact[..., : near.shape[-1]]).norm() / exact.norm())
    if not error < 0.05:
        raise SystemExit(f"degree 2 is {error:.1%} from softmax on numbers it is made for")


@torch.inference_mode()
def measure(width: int) -> dict[str, Times]:
    """Seconds by form and length."""
    check(Inputs.of(LENGTHS[0], width), width)
    found: dict[str, Times] = {name: {} for name in forms(width)}
    for length in LENGTHS:
        x = Inputs.of(length, width)
        for name, run in forms(width).items():
            times = found[name]
            # Softmax takes four times as long for twice the length.
            expected = 4 * times[length // 2] if length // 2 in times else 0.0
            if expected <= 2 * LIMIT and (length == LENGTHS[0] or times):
                times[length] = seconds(run, x)
                print(f"d={width} {length:6} tokens, {name:14} {times[length]:9.5f} s", flush=True)
    return found


def measured_crossover(exact: Times, other: Times) -> float | None:
    """The length from which the other form stays faster; None where it is not."""
    lengths = sorted(exact.keys() & other.keys())
    gains = [math.log(exact[n] / other[n]) for n in lengths]
    if not gains or gains[-1] <= 0:
        return None
    slower = [i for i, gain in enumerate(gains) if gain <= 0]
    if not slower:
        return float(lengths[0])
    i = slower[-1]
    share = -gains[i] / (gains[i + 1] - gains[i])
    return float(lengths[i] * (lengths[i + 1] / lengths[i]) ** share)


def plot(found: Mapping[int, Mapping[str, Times]]) -> None:
    """Writes longcontext.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(11, 4), sharey=True)
    for panel, (width, times) in zip(axes, found.items(), strict=True):
        for name, one in times.items():
            panel.loglog(list(one), [1e3 * t for t in one.values()], marker="o", label=name)
        panel.set_title(f"{width} coordinates, {VALUES} values")
        panel.set_xlabel("tokens")
        panel.set_xticks(LENGTHS, [f"{n // 1024}K" for n in LENGTHS])
        panel.minorticks_off()
        panel.legend()
    axes[0].set_ylabel("milliseconds")
    figure.savefig(RESULTS / "longcontext.svg", bbox_inches="tight", metadata={"Date": None})


def summary(width: int, times: Mapping[str, Times]) -> list[dict[str, object]]:
    """Where each form becomes faster than softmax, measured and predicted."""
    rows: list[dict[str, object]] = []
    for name, one in times.items():
        if name == SOFTMAX:
            continue
        degree = int(name.split()[1].rstrip(","))
        at = measured_crossover(times[SOFTMAX], one)
        predicted = None if "FFT" in name else round(crossover(width, VALUES, degree))
        rows.append(
            {
                "width": width,
                "form": name,
                "faster from (tokens)": None if at is None else round(at),
                "predicted by FLOPs (tokens)": predicted,
            }
        )
        said = "not up to there" if at is None else f"from {at:,.0f} tokens"
        told = "" if predicted is None else f", predicted {predicted:,}"
        print(f"d={width} {name}: faster than softmax {said}{told}")
    return rows


def main() -> None:
    """Measures all forms at both widths."""
    torch.set_num_threads(2)
    device = torch.cuda.get_device_name() if GPU else "cpu"
    widths = WIDTHS[:1] if GPU else WIDTHS
    found = {width: measure(width) for width in widths}
    rows = [row for width, times in found.items() for row in summary(width, times)]
    goal = next((at for name, at in GOALS.items() if device.startswith(name)), None)
    reached = next(r["faster from (tokens)"] for r in rows if r["form"] == "degree 2")
    missed = [] if goal is None or (reached is not None and reached <= goal) else ["degree 2"]  # type: ignore[operator]
    if not GPU:
        plot(found)
    content = {
        "device": device,
        "torch": torch.__version__,
        "dtype": "fp16, 32 heads" if GPU else "fp32, one head, 2 threads",
        "seconds": {
            f"d={width}": {
                name: {n: round(t, 6) for n, t in times.items()} for name, times in of.items()
            }
            for width, of in found.items()
        },
        "crossovers": rows,
        "goal": {"degree 2 of 64 coordinates is faster from (tokens)": goal},
        "missed": missed,
    }
    write_result("longcontext-gpu" if GPU else "longcontext", content)
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
