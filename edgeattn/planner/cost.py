"""What decoding a token costs by the number of heads: cost-optimal GQA, arXiv 2503.09579.

With N parameters, L layers, heads D wide, T tokens of context, Hq query and Hkv KV heads:

    C(T) = 2 N + 4 T L D Hq                             FLOPs
    M(T) =   N + 2 T L D Hkv                            values
    Z    = lambda M^alpha + (1 - lambda) C^beta         lambda 0.9, alpha 1/2, beta 1/3

N is that of all matrices; the paper's tables are tied. It prints two matrices for an MLP where a
gated one has three, which `ModelShape.num_parameters` counts; then 36 layers of width 1536 with 24
query heads come to 1.10 billion, not to 0.87.

A candidate differs from the model at hand in its heads alone: width, depth and MLP stay, and N with
them but for the four projections of attention. The paper instead lets N grow as heads become fewer
until the loss is the same, N*(H) = a / (L* - E)^(1/b), but prints no a, b and E. So each candidate
comes with the N at which it would cost as much as the model at hand: it is the better one if it
reaches the same loss with fewer parameters. What loss it has is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from edgeattn.planner.lowering import Lowering
from edgeattn.planner.memory import cache_bytes_per_token, state_bytes, weight_bytes
from edgeattn.planner.recurrent import state_flops
from edgeattn.shape import ModelShape

# Query and KV heads that the paper trained: powers of two up to the largest width over D.
MOST_HEADS = 32
# What the paper stores a value in, as far as its trade-off between memory and FLOPs goes.
_VALUE_BYTES = 2
# Bits of a float's mantissa: each halving of a range settles one.
_BISECTIONS = 53


class Heads(NamedTuple):
    """Query heads and KV heads of each layer."""

    query: int
    kv: int


def inference_flops(
    parameters: float, layers: int, width: int, query_heads: int, context: float
) -> float:
    """C(T): FLOPs of the token at the end of a context.

    Args:
        parameters: that are multiplied with.
        layers: of attention.
        width: of a head.
        query_heads: of a layer.
        context: in tokens.
    """
    return 2 * parameters + 4 * context * layers * width * query_heads


def inference_values(
    parameters: float, layers: int, width: int, kv_heads: int, context: float
) -> float:
    """M(T): numbers in weights and cache; arguments as for `inference_flops`."""
    return parameters + 2 * context * layers * width * kv_heads


@dataclass(frozen=True)
class Tradeoff:
    """How memory and FLOPs become one cost.

    Attributes:
        memory_share: lambda.
        memory_exponent: alpha.
        flops_exponent: beta.
    """

    memory_share: float = 0.9
    memory_exponent: float = 1 / 2
    flops_exponent: float = 1 / 3

    def cost(self, values: float, flops: float) -> float:
        """Z, which only means something beside another Z.

        Args:
            values: numbers that are held.
            flops: of a token.
        """
        memory, compute = values**self.memory_exponent, flops**self.flops_exponent
        return float(self.memory_share * memory + (1 - self.memory_share) * compute)


@dataclass(frozen=True)
class StepCost:
    """A decode step of all rows at the end of a context.

    Attributes:
        parameters: N.
        weight_bytes: as stored, with scales.
        cache_bytes: keys and values of all rows.
        weight_flops: of products with weights.
        attention_flops: of scores and of the values they weigh.
    """

    parameters: int
    weight_bytes: int
    cache_bytes: int
    weight_flops: float
    attention_flops: float

    @property
    def memory_bytes(self) -> int:
        """Weights and cache."""
        return self.weight_bytes + self.cache_bytes

    @property
    def flops(self) -> float:
        """All of them."""
        return self.weight_flops + self.attention_flops

    def cost(self, tradeoff: Tradeoff) -> float:
        """Z of these bytes, counted as values of 16 bits.

        With 16-bit weights and cache and one row it is the paper's own.
        """
        return tradeoff.cost(self.memory_bytes / _VALUE_BYTES, self.flops)

    def times(self, factor: float) -> StepCost:
        """The same with `factor` times the weights; layers and heads stay, and the cache."""
        return replace(
            self,
            parameters=round(self.parameters * factor),
            weight_bytes=round(self.weight_bytes * factor),
            weight_flops=self.weight_flops * factor,
        )

    def parameters_at(self, cost: float, tradeoff: Tradeoff) -> int | None:
        """N that brings Z to `cost`; None where cache and attention alone cost more."""
        low, high = 0.0, 1.0
        if self.times(low).cost(tradeoff) > cost:
            return None
        while self.times(high).cost(tradeoff) <= cost:
            low, high = high, 2 * high
        for _ in range(_BISECTIONS):  # beyond them a float has no middle
            middle = (low + high) / 2
            within = self.times(middle).cost(tradeoff) <= cost
            low, high = (middle, high) if within else (low, middle)
        return round(low * self.parameters)


def step_cost(shape: ModelShape, lowering: Lowering, context: int, batch: int) -> StepCost:
    """What a model costs with its weights and cache as a scheme stores them.

    Layers with a sliding window count as others: their cache is as long.

    Args:
        shape: the architecture.
        lowering: how it is stored.
        context: tokens of each row.
        batch: rows.
    """
    attention = inference_flops(0, shape.caching_layers, shape.head_dim, shape.num_heads, context)
    cache = cache_bytes_per_token(shape, lowering) * context + state_bytes(shape, lowering)
    return StepCost(
        parameters=shape.num_parameters,
        weight_bytes=weight_bytes(shape, lowering),
        cache_bytes=cache * batch,
        weight_flops=2.0 * batch * multiplied_parameters(shape),
        attention_flops=batch * (attention + state_flops(shape)),
    )


def multiplied_parameters(shape: ModelShape) -> int:
    """N without an embedding that is no head, of which a token only reads a row."""
    table = shape.vocab_size * shape.hidden_size
    return shape.num_parameters - (0 if shape.tied_embeddings else table)


@dataclass(frozen=True)
class PaperCost:
    """What the paper's formulas give, for one row and whatever bits there are.

    Attributes:
        values: M.
        flops: C.
        cost: Z.
    """

    values: float
    flops: float
    cost: float


def paper_cost(shape: ModelShape, context: int, tradeoff: Tradeoff) -> PaperCost:
    """M, C and Z of a model at a context; the paper knows no layers but those with a cache."""
    layers, width = shape.caching_layers, shape.head_dim
    values = inference_values(shape.num_parameters, layers, width, shape.num_kv_heads, context)
    multiplied = multiplied_parameters(shape)
    flops = inference_flops(multiplied, layers, width, shape.num_heads, context)
    return PaperCost(values, flops, tradeoff.cost(values, flops))


def with_heads(shape: ModelShape, heads: Heads) -> ModelShape:
    """The model with other heads of the same width."""
    return replace(shape, num_heads=heads.query, num_kv_heads=heads.kv)


def candidate_heads(shape: ModelShape) -> list[Heads]:
    """The paper's 21 pairs of powers of two, and all KV heads that the model's own could share.

    Only its own where no layer has a cache, as heads then change nothing that is costed.
    """
    if not shape.caching_layers:
        return [Heads(shape.num_heads, shape.num_kv_heads)]
    powers = [2**n for n in range(MOST_HEADS.bit_length())]
    published = {Heads(query, kv) for query in powers for kv in powers if kv <= query}
    own = shape.num_heads
    shared = {Heads(own, kv) for kv in range(1, own + 1) if own % kv == 0}
    return sorted(published | shared)
