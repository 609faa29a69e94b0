"""How many bytes a model takes: weights as stored, cache per token."""

from __future__ import annotations

from dataclasses import replace

from edgeattn.planner.lowering import Lowering
from edgeattn.quant.scheme import INT8_PER_CHANNEL, WeightFormat
from edgeattn.recurrent import Recurrent
from edgeattn.shape import ModelShape

DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def weight_bytes(shape: ModelShape, lowering: Lowering) -> int:
    """Bytes of the weights file, page padding left out.

    At most, where layers are kept at higher precision: which they are depends on the weights.
    """
    kept, wide = _kept_bytes(shape, lowering), DTYPE_BYTES[lowering.dtype]
    shape = stored_shape(shape, lowering)
    linear = sum(
        count * matrix_bytes(n, k, lowering.scheme.format_of(name), wide)
        for kind, count in shape.kind_counts.items()
        for name, (n, k) in shape.linears(kind).items()
    )
    formats = table_formats(shape, lowering)
    tables = len(formats)
    table_bytes = sum(
        matrix_bytes(shape.vocab_size, shape.hidden_size, format, wide) for format in formats
    )
    quantised = shape.linear_weights + tables * shape.vocab_size * shape.hidden_size
    rest = (shape.num_parameters - quantised) * wide
    return linear + kept + table_bytes + rest + rotary_bytes(shape, lowering)


def read_bytes(shape: ModelShape, lowering: Lowering) -> int:
    """Bytes of the weights that a decode step reads: of an embedding that is no head, none.

    It reads one row of it for each token, which is left out.
    """
    if stored_shape(shape, lowering).tied_embeddings:
        return weight_bytes(shape, lowering)
    table = (shape.vocab_size, shape.hidden_size)
    embedding = matrix_bytes(*table, lowering.scheme.embedding, DTYPE_BYTES[lowering.dtype])
    return weight_bytes(shape, lowering) - embedding


def _kept_bytes(shape: ModelShape, lowering: Lowering) -> int:
    """The most that int8 instead of int4 adds in layers that the scheme keeps."""
    scheme, wide, more = lowering.scheme, DTYPE_BYTES[lowering.dtype], []
    for kind, count in shape.kind_counts.items():
        for name, (n, k) in shape.linears(kind).items():
            formats = (INT8_PER_CHANNEL, scheme.format_of(name))
            kept, plain = (matrix_bytes(n, k, format, wide) for format in formats)
            more += [max(kept - plain, 0)] * count
    return sum(sorted(more, reverse=True)[: int(scheme.keep * len(more))])


def table_formats(shape: ModelShape, lowering: Lowering) -> list[WeightFormat | None]:
    """Formats of the embedding and, where it is a matrix of its own, the LM head."""
    scheme = lowering.scheme
    return [scheme.embedding] if shape.tied_embeddings else [scheme.embedding, scheme.head]


def stored_shape(shape: ModelShape, lowering: Lowering) -> ModelShape:
    """The shape of what the graph holds.

    Projections are stacked for GroupQueryAttention, and the head of a rotated model is its own
    matrix.
    """
    return replace(
        shape,
        fused=lowering.attention == "group-query",
        tied_embeddings=shape.tied_embeddings and lowering.scheme.rotation == "none",
    )


def rotary_bytes(shape: ModelShape, lowering: Lowering) -> int:
    """Bytes of the constants of rotary positions: fp32 frequencies, or two tables by position."""
    numbers = sum(rope.dim // 2 for rope in shape.ropes)
    if lowering.attention != "group-query":
        return 4 * numbers
    context = lowering.context or shape.max_context
    return 2 * context * numbers * DTYPE_BYTES[lowering.dtype]


def matrix_bytes(outputs: int, inputs: int, format: WeightFormat | None, wide: int) -> int:
    """Bytes of one weight matrix with its scales.

    Args:
        outputs: rows.
        inputs: columns, along which groups share a scale.
        format: None for floating point.
        wide: bytes of a floating-point weight or scale.
    """
    if format is None:
        return outputs * inputs * wide
    scales = outputs * (inputs // format.group_size if format.group_size else 1)
    zero_points = scales if format.bits == 8 else 0
    return (outputs * inputs * format.bits + 7) // 8 + scales * wide + zero_points


def cache_bytes_per_token(shape: ModelShape, lowering: Lowering) -> int:
    """Bytes of keys and values that one token adds, over all layers."""
    wide = 1 if lowering.scheme.kv_bits is not None else DTYPE_BYTES[lowering.dtype]
    return 2 * shape.caching_layers * shape.kv_size * wide


def state_bytes(shape: ModelShape, lowering: Lowering) -> int:
    """Bytes of the states of one row's linear attention, whatever its length."""
    wide, total = DTYPE_BYTES[lowering.dtype], 0
    for kind, count in shape.kind_counts.items():
        if isinstance(kind.attention, Recurrent):
            held = kind.attention.channels * (kind.attention.conv_width - 1)
            total += count * (4 * kind.attention.state_numbers + wide * held)
    return total
