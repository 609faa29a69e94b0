"""What attention variants could buy a model at a context: bounds, before anything is measured.

Head sparsity is judged by the bytes that decoding reads, polynomials by the work of a prompt. Both
bounds are generous: they leave out routers and launches, and let all heads take a polynomial, where
of trained models few do.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from edgeattn.attention import FftRopeRequest, HeadSparseRequest, LayerRequest
from edgeattn.devices.registry import Target
from edgeattn.errors import LoweringError
from edgeattn.planner.head_sparsity import WORTH_IT, cache_share, decode_speedup, least_context
from edgeattn.planner.lowering import Lowering, check_request
from edgeattn.planner.memory import cache_bytes_per_token, read_bytes
from edgeattn.planner.polynomial import (
    attention_gain,
    flops_crossover,
    machine_of,
    speed_crossover,
)
from edgeattn.planner.roofline import prompt_work
from edgeattn.shape import ModelShape

# Those at which arXiv 2505.14884 found little loss, for models of 7 billion parameters and more.
DENSITIES = (Fraction(5, 8), Fraction(1, 2))
# Higher ones have too many features to pay within any context of today.
DEGREES = (1, 2)


@dataclass(frozen=True)
class SparsityGain:
    """Decoding with a share of the heads.

    Attributes:
        density: that share.
        cache_share: of the cache in what a step reads.
        speedup: at most.
        least_context: tokens of each row from which it gains `WORTH_IT`.
    """

    density: float
    cache_share: float
    speedup: float
    least_context: int

    @property
    def worth_it(self) -> bool:
        """Whether it is worth a loss at all."""
        return self.speedup >= WORTH_IT


@dataclass(frozen=True)
class PolynomialGain:
    """A prompt whose far keys are weighed by polynomials, in all heads that see all keys.

    Attributes:
        degree: of the polynomials.
        attention: of attention alone, time or, without figures of the target, FLOPs before over
            after.
        prompt: of the whole prompt likewise.
        flops_crossover: tokens from which a head takes fewer FLOPs than exact attention.
        speed_crossover: from which it is faster on the target; None without figures.
    """

    degree: int
    attention: float
    prompt: float
    flops_crossover: float
    speed_crossover: int | None

    @property
    def worth_it(self) -> bool:
        """Whether it is worth a loss at all."""
        return self.prompt >= WORTH_IT


@dataclass(frozen=True)
class AttentionGains:
    """What the variants could buy; empty where the model cannot have them.

    Attributes:
        head_sparsity: by density.
        polynomials: by degree.
        refused: why a model has none, one sentence; None where it has.
    """

    head_sparsity: tuple[SparsityGain, ...]
    polynomials: tuple[PolynomialGain, ...]
    refused: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        sparse = [{**asdict(gain), "worth_it": gain.worth_it} for gain in self.head_sparsity]
        prompts = [{**asdict(gain), "worth_it": gain.worth_it} for gain in self.polynomials]
        return {"head_sparsity": sparse, "polynomials": prompts, "refused": self.refused}


def attention_gains(
    shape: ModelShape, lowering: Lowering, target: Target, context: int, batch: int
) -> AttentionGains:
    """What fewer heads and polynomials could buy.

    Args:
        shape: the architecture.
        lowering: how weights and cache are stored.
        target: whose rates count for prompts.
        context: tokens of each row.
        batch: rows.
    """
    requests: tuple[LayerRequest, ...] = (HeadSparseRequest(DENSITIES[-1]), FftRopeRequest())
    sparse, prompts = (_refusal(request, shape) for request in requests)
    return AttentionGains(
        () if sparse else tuple(_sparsity(shape, lowering, context, batch)),
        () if prompts else tuple(_polynomials(shape, lowering, target, context)),
        sparse or prompts,
    )


def _refusal(request: LayerRequest, shape: ModelShape) -> str | None:
    try:
        check_request(request, shape)
    except LoweringError as error:
        return str(error)
    return None


def _sparsity(
    shape: ModelShape, lowering: Lowering, context: int, batch: int
) -> list[SparsityGain]:
    weights, per_token = read_bytes(shape, lowering), cache_bytes_per_token(shape, lowering)
    share = cache_share(weights, per_token, context, batch)
    gains = []
    for density in map(float, DENSITIES):
        least = least_context(weights, per_token, batch, density)
        gains.append(SparsityGain(density, share, decode_speedup(share, density), math.ceil(least)))
    return gains


def _polynomials(
    shape: ModelShape, lowering: Lowering, target: Target, context: int
) -> list[PolynomialGain]:
    """Of one row; more rows gain as much."""
    asked, machine = FftRopeRequest(), machine_of(target, lowering.dtype)
    near, shape = asked.sink + asked.window, shape.within(context)
    full = [layer for layer in range(shape.num_layers) if shape.layer_kind(layer).window is None]
    work = prompt_work(shape, lowering, context, 1)
    share = work.attention_flops / work.flops
    gains = []
    for degree in DEGREES:
        heads = {layer: (degree, shape.num_heads) for layer in full}
        gain = attention_gain(shape, heads, near, context, machine)
        attention = gain.flops if gain.speed is None else gain.speed
        gains.append(
            PolynomialGain(
                degree,
                attention,
                1 / (1 - share + share / attention),
                flops_crossover(shape.head_dim, degree, near),
                None if machine is None else speed_crossover(shape, degree, near, machine),
            )
        )
    return gains
