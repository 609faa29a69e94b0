"""The least time a step can take on a target: what it computes by peak rate, or moves by bandwidth.

Predicted, never measured: kernels, launches, activations and the host come on top. A decode step
reads all weights once and each row's own cache; a prompt reads the weights once and writes the
cache. Weights that alone are integers are widened first, so that products run in the dtype of the
activations; a scheme that rounds activations too multiplies int8 in its linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeattn.devices.registry import Target
from edgeattn.planner.cost import inference_flops, multiplied_parameters
from edgeattn.planner.lowering import Lowering
from edgeattn.planner.memory import cache_bytes_per_token, read_bytes, state_bytes
from edgeattn.planner.recurrent import state_flops
from edgeattn.shape import ModelShape


@dataclass(frozen=True)
class Rates:
    """What a target reaches at most.

    Attributes:
        bytes_per_s: of memory.
        flops_per_s: of products in the activations' dtype; None where that is not published.
        linear_flops_per_s: of the linear layers' products; None likewise.
        modes: power modes the figures hold in; empty where they hold in all.
    """

    bytes_per_s: float
    flops_per_s: float | None
    linear_flops_per_s: float | None
    modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What a step or a prompt takes.

    Attributes:
        linear_flops: of the blocks' linear layers.
        head_flops: of the LM head, and of norms and biases.
        attention_flops: of scores and of the values they weigh.
        moved_bytes: of weights and cache.
    """

    linear_flops: float
    head_flops: float
    attention_flops: float
    moved_bytes: float

    @property
    def flops(self) -> float:
        """All of them."""
        return self.linear_flops + self.head_flops + self.attention_flops


@dataclass(frozen=True)
class Prediction:
    """Bounds by the roofline.

    Attributes:
        tokens_per_s: decoded by all rows together, at most.
        bound: what limits them: "memory", "compute", or "memory alone" where no peak rate is known.
        prompt_s: to read a prompt of the whole context in each row, at least; None without a rate.
    """

    tokens_per_s: float
    bound: Literal["memory", "compute", "memory alone"]
    prompt_s: float | None


def rates_of(target: Target, lowering: Lowering) -> Rates | None:
    """The figures of a target for a graph; None where it has none, as the CPU at hand."""
    memory, peak = target.device.memory, target.device.peak
    if memory is None:
        return None
    flops = _per_second(getattr(peak, lowering.dtype, None))
    linear = flops
    if lowering.scheme.activation_bits is not None:
        linear = _per_second(getattr(peak, "int8", None))
    modes = (memory.mode, peak.mode if peak else None)
    named = tuple(dict.fromkeys(mode for mode in modes if mode is not None))
    return Rates(1e9 * memory.bandwidth_gb_s, flops, linear, named)


def _per_second(tera: float | None) -> float | None:
    return None if tera is None else 1e12 * tera


def decode_work(shape: ModelShape, lowering: Lowering, context: int, batch: int) -> Work:
    """Of a step of one token in each row, at the end of the context."""
    linear, head = _products(shape)
    # A state is read and written whole.
    cache = context * cache_bytes_per_token(shape, lowering) + 2 * state_bytes(shape, lowering)
    return Work(
        linear_flops=2.0 * batch * linear,
        head_flops=2.0 * batch * head,
        attention_flops=batch * _attention_flops(shape, context),
        moved_bytes=read_bytes(shape, lowering) + batch * cache,
    )


def prompt_work(shape: ModelShape, lowering: Lowering, context: int, batch: int) -> Work:
    """Of a prompt as long as the context in each row, whose tokens see half of it on the mean."""
    linear, head = _products(shape)
    tokens = batch * context
    return Work(
        linear_flops=2.0 * tokens * linear,
        head_flops=2.0 * head * (tokens if lowering.logits == "all" else batch),
        attention_flops=tokens * _attention_flops(shape, context / 2),
        moved_bytes=read_bytes(shape, lowering) + tokens * cache_bytes_per_token(shape, lowering),
    )


def _products(shape: ModelShape) -> tuple[int, int]:
    """Parameters of the linear layers, and others that are multiplied with."""
    linear = shape.linear_weights
    return linear, multiplied_parameters(shape) - linear


def _attention_flops(shape: ModelShape, keys: float) -> float:
    softmax = inference_flops(0, shape.caching_layers, shape.head_dim, shape.num_heads, keys)
    return softmax + state_flops(shape)


def predict(
    shape: ModelShape, lowering: Lowering, context: int, batch: int, rates: Rates
) -> Prediction:
    """What a target reaches at most with a model.

    Args:
        shape: the architecture.
        lowering: how weights and cache are stored, and what is computed in.
        context: tokens of each row.
        batch: rows.
        rates: of the target.
    """
    step = decode_work(shape, lowering, context, batch)
    moving, computing = step.moved_bytes / rates.bytes_per_s, _compute_s(step, rates)
    prompt = prompt_work(shape, lowering, context, batch)
    prompt_s = _compute_s(prompt, rates)
    if prompt_s is not None:
        prompt_s = max(prompt_s, prompt.moved_bytes / rates.bytes_per_s)
    if computing is None:
        return Prediction(batch / moving, "memory alone", prompt_s)
    return Prediction(
        batch / max(moving, computing), "memory" if moving >= computing else "compute", prompt_s
    )


def _compute_s(work: Work, rates: Rates) -> float | None:
    if rates.flops_per_s is None or rates.linear_flops_per_s is None:
        return None
    other = work.head_flops + work.attention_flops
    return work.linear_flops / rates.linear_flops_per_s + other / rates.flops_per_s
