"""What polynomial attention costs beside exact attention, by arithmetic alone.

Of one head, per token, at a context of n tokens (D query and key, Dv value elements, degree g):

    exact         2 n (D + Dv) FLOPs, half of that where causal
    factorised    4 F (Dv + 1) FLOPs, F = C(D + g, g) features, whatever n is

A decoder that kept the state of F (Dv + 1) fp32 numbers would read and write it for each token, in
place of n keys and values. `edgeattn::FftRopeAttention` has no state among its inputs: in decoding
it reads all keys, as exact attention does, so that only the FLOPs of a prompt are saved today. FFT
is never cheaper for plain RoPE, whose scores factorise: its products cost 10 log2(2 n) + 6 where
features cost 4 (and `fft_flops` is here to say so).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import comb

from edgeattn.devices.registry import Target
from edgeattn.shape import ModelShape

# A shorter prompt is read key by key.
LEAST_SEGMENTS = 4
_STATE_BYTES = 4  # fp32, whatever the model computes in


def features(width: int, degree: int) -> int:
    """Products of at most `degree` of `width` coordinates."""
    return comb(width + degree, degree)


def state_bytes(width: int, value_width: int, degree: int) -> int:
    """Of the sums over all far keys, in fp32."""
    return _STATE_BYTES * features(width, degree) * (value_width + 1)


def exact_flops(width: int, value_width: int, context: float, *, causal: bool = True) -> float:
    """FLOPs per token of exact attention; on the mean over a prompt where causal."""
    return 2 * context * (width + value_width) / (2 if causal else 1)


def factorised_flops(width: int, value_width: int, degree: int) -> int:
    """FLOPs per token of the features' two products: into the state and out of it."""
    return 4 * features(width, degree) * (value_width + 1)


def fft_flops(width: int, value_width: int, degree: int, context: int) -> float:
    """FLOPs per token of the same sums by real FFTs."""
    per_term = 10 * math.log2(2 * context) + 6
    return features(width, degree) * (value_width + 1) * per_term


def crossover(width: int, value_width: int, degree: int, *, causal: bool = True) -> float:
    """Context from which features alone take fewer FLOPs than exact attention, in tokens."""
    flops = factorised_flops(width, value_width, degree)
    return flops / exact_flops(width, value_width, 1, causal=causal)


def segment_length(width: int, degree: int) -> int:
    """Keys between two states that the kernels keep; those behind the last are read one by one."""
    return max(512, width**2 // 2 if degree > 1 else 0)


def flops_crossover(width: int, degree: int, near: int) -> float:
    """Context from which a head takes fewer FLOPs in the kernels than exact attention, in tokens.

    Args:
        width: of queries, keys and values.
        degree: of the polynomial.
        near: keys of a row that are exact, first ones and window.
    """
    segment = segment_length(width, degree)
    flops = factorised_flops(width, width, degree) + _read_flops(width, degree, near)
    least = flops / exact_flops(width, width, 1)
    return max(least, LEAST_SEGMENTS * segment)


def _read_flops(width: int, degree: int, near: int) -> float:
    """Per token, for keys that are read one by one: near ones, and half a segment on the mean."""
    keys = near + segment_length(width, degree) / 2
    return exact_flops(width, width, keys, causal=False)


@dataclass(frozen=True)
class Machine:
    """What bounds a kernel.

    Attributes:
        flops_per_s: of dense products.
        bytes_per_s: of memory.
        element_bytes: of a query, key or value.
    """

    flops_per_s: float
    bytes_per_s: float
    element_bytes: int

    def seconds(self, flops: float, moved_bytes: float) -> float:
        """The roofline: the longer of computing and moving."""
        return max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)


def machine_of(target: Target, dtype: str | None = None) -> Machine | None:
    """The figures of a target; None where they are not known.

    Args:
        target: device and software.
        dtype: that heads compute in; None is the target's preferred one.
    """
    device, dtype = target.device, dtype or target.preferred_dtype
    peak = getattr(device.peak, dtype, None)
    if peak is None or device.memory is None:
        return None
    wide = 4 if dtype == "fp32" else 2
    return Machine(1e12 * peak, 1e9 * device.memory.bandwidth_gb_s, wide)


@dataclass(frozen=True)
class HeadCost:
    """One head on a prompt, per token.

    Attributes:
        flops: on the mean over the prompt.
        moved_bytes: between memory and processor.
    """

    flops: float
    moved_bytes: float


def exact_cost(shape: ModelShape, context: int, element_bytes: int) -> HeadCost:
    """Of a causal head whose score matrix stays on the processor."""
    width = shape.head_dim
    return HeadCost(exact_flops(width, width, context), 4 * width * element_bytes)


def polynomial_cost(
    shape: ModelShape, degree: int, near: int, context: int, element_bytes: int
) -> HeadCost:
    """Of a head in the kernels: by features, keys of the last segment and near ones one by one.

    Args:
        shape: for the width of heads.
        degree: of the polynomial.
        near: keys of a row that are exact, first ones and window.
        context: length of the prompt.
        element_bytes: of a query, key or value.
    """
    width, segment = shape.head_dim, segment_length(shape.head_dim, degree)
    if context < LEAST_SEGMENTS * segment:
        return exact_cost(shape, context, element_bytes)
    flops = factorised_flops(width, width, degree) + _read_flops(width, degree, near)
    moved = 2 * state_bytes(width, width, degree) / segment + 4 * width * element_bytes
    return HeadCost(flops, moved)


@dataclass(frozen=True)
class Gain:
    """What all attention of a model gains on a prompt.

    Attributes:
        flops: exact attention's FLOPs over those with polynomials; above 1 is cheaper.
        speed: the same of roofline seconds; None where the machine is not known.
    """

    flops: float
    speed: float | None


def attention_gain(
    shape: ModelShape,
    polynomial_heads: dict[int, tuple[int, int]],
    near: int,
    context: int,
    machine: Machine | None,
) -> Gain:
    """What the chosen heads buy.

    Args:
        shape: of the model.
        polynomial_heads: layer -> (degree, heads that take polynomials).
        near: keys of a row that are exact, first ones and window.
        context: length of the prompt.
        machine: for seconds.
    """
    wide = 2 if machine is None else machine.element_bytes
    exact = exact_cost(shape, context, wide)
    before = [exact] * (shape.num_layers * shape.num_heads)
    after = before[: len(before) - sum(heads for _, heads in polynomial_heads.values())]
    for degree, heads in polynomial_heads.values():
        after = after + [polynomial_cost(shape, degree, near, context, wide)] * heads
    speed = None
    if machine is not None:
        speed = _seconds(before, machine) / _seconds(after, machine)
    return Gain(sum(c.flops for c in before) / sum(c.flops for c in after), speed)


def _seconds(costs: list[HeadCost], machine: Machine) -> float:
    return sum(machine.seconds(cost.flops, cost.moved_bytes) for cost in costs)


def speed_crossover(shape: ModelShape, degree: int, near: int, machine: Machine) -> int:
    """The context from which a head by features is faster on a machine's roofline, in tokens."""
    wide, context = machine.element_bytes, 1

    def gains(at: int) -> bool:
        pair = (exact_cost(shape, at, wide), polynomial_cost(shape, degree, near, at, wide))
        exact, polynomial = (machine.seconds(c.flops, c.moved_bytes) for c in pair)
        return polynomial < exact

    while not gains(context):
        context *= 2
    low, high = context // 2, context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gains(middle) else (middle, high)
    return high
