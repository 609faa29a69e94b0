"""What the export of an encoder takes, as `edgeattn.planner.estimate` says it of a decoder.

Sizes follow from the shape. Bytes of graphs and peak memory were measured with MiniLM (6 layers)
and a ViT-S/14 (12 layers, from its ONNX file): peaks of 684 MB for cpu, and of 826 MB for cpu and
777 MB for jetson-orin, within 17 % of the estimate. The rates of the stages are those of decoders.
"""

from __future__ import annotations

from edgeattn.attention import LionRequest
from edgeattn.encoder_shape import AnyShape, EncoderShape, TokenInput
from edgeattn.planner.calibration import (
    calibration_bytes,
    calibration_seconds,
    window_length,
    work_bytes,
)
from edgeattn.planner.estimate import RTX_BASE_MEMORY, Estimate, tensorrt_build_bytes
from edgeattn.planner.lowering import Lowering
from edgeattn.planner.memory import DTYPE_BYTES, matrix_bytes

# model.onnx: bytes per block by spelling of attention, and per quantised matrix by bits.
_BLOCK_BYTES = {"standard": 6_150, "primitive": 7_000}
_QUANTISED_BYTES = {8: 680, 4: 490}
# Tokenizer, configurations, report, and the padding between tensors: at most, of both models.
_SMALL_BYTES = 1_000_000
# Tokens of the proof's texts (`verify.encoder_golden`), and its images.
_PROOF_TOKENS, _PROOF_IMAGES = 68, 2
_BASE_MEMORY, _BYTES_PER_WEIGHT = 431_000_000, 12

_START_S, _TRACE_S = 2.1, 3.4
_WRITTEN_BYTES_PER_S = 300e6
_REFERENCE_PER_S, _ONNXRUNTIME_PER_S = 38e6, 27e6
_RTX_START_S, _RTX_BLOCK_S = 0.6, 0.28
# What building an engine takes beside its base: copies of the weights, and bytes per block. Of both
# models in fp16, w8-rtn and w4-rtn, 336 to 434 MB were measured, at most 5 % less than this.
_BUILT_COPIES, _BUILT_BLOCK_BYTES = 2.5, 7_000_000
# Tensors of an MLP that are alive together: before and behind its activation, or as a decoder's.
_MLP_TENSORS, _GATED_TENSORS = 2, 4
# Weights of the blocks times tokens in a second, and tokens of a step (`transforms.linearize`).
_TRAINED_PER_S, _STEP_TOKENS = 7.3e9, 512


def encoder_weight_bytes(shape: EncoderShape, lowering: Lowering) -> int:
    """Bytes of the weights file, page padding left out."""
    wide, scheme = DTYPE_BYTES[lowering.dtype], lowering.scheme
    matrices = [
        (n, k, scheme.format_of(name)) for name, (n, k) in shape.linears().items()
    ] * shape.num_layers
    if isinstance(shape.input, TokenInput):
        matrices.append((shape.input.vocab_size, shape.hidden_size, scheme.embedding))
    rest = shape.num_parameters - sum(n * k for n, k, _ in matrices)
    frequencies = 4 * sum(rope.dim // 2 for rope in shape.ropes)
    stored = sum(matrix_bytes(n, k, format, wide) for n, k, format in matrices)
    return stored + rest * wide + frequencies


def build_bytes(shape: AnyShape, lowering: Lowering) -> int:
    """Memory of the process that builds an engine; of a decoder `tensorrt_build_bytes`."""
    if not isinstance(shape, EncoderShape):
        return tensorrt_build_bytes(shape, lowering)
    weights = encoder_weight_bytes(shape, lowering)
    return int(RTX_BASE_MEMORY + _BUILT_COPIES * weights + _BUILT_BLOCK_BYTES * shape.num_layers)


def encoder_activation_bytes(shape: EncoderShape, lowering: Lowering) -> int:
    """Bytes per token of the tensors that are alive together, at the step of a block that has most.

    As `edgeattn.planner.fit` counts a decoder's: beside the residual stream these are the MLP's, or
    what attention reads, or fp32 scores of attention that is spelled out, and its values.
    """
    wide = DTYPE_BYTES[lowering.dtype]
    always = shape.hidden_size + sum(rope.dim for rope in shape.ropes)
    mlp = (_GATED_TENSORS if shape.gated else _MLP_TENSORS) * shape.intermediate_size
    heads = 2 * (shape.q_size + shape.kv_size)  # one of q, k and v is being transposed
    scores = 0
    if lowering.attention == "primitive":
        context = lowering.context or shape.max_context
        scores = 2 * 4 * shape.num_heads * context + shape.q_size * wide
    return always * wide + max(mlp * wide, heads * wide, scores)


def encoder_output_bytes(shape: EncoderShape, lowering: Lowering) -> int:
    """Bytes of a row of what the graph gives."""
    context = lowering.context or shape.max_context
    numbers = {
        "hidden": context * shape.hidden_size,
        "embedding": shape.hidden_size,
        "classification": shape.num_labels,
    }
    return numbers[shape.task] * DTYPE_BYTES[lowering.dtype]


def estimate_encoder(
    shape: EncoderShape,
    lowering: Lowering,
    *,
    verify: bool = True,
    tensorrt: bool = False,
    calibration_windows: int = 0,
    training_steps: int | None = None,
) -> Estimate:
    """What exporting an encoder of `shape` takes.

    Args:
        shape: the architecture.
        lowering: what was decided (`fit_encoder_lowering`).
        verify: whether the bundle is proven.
        tensorrt: whether TensorRT-RTX is there to build it.
        calibration_windows: of the text, or images, for a scheme that needs some.
        training_steps: of distilling linear attention, None without.
    """
    disk = 0
    if isinstance(lowering.request, LionRequest):
        shape = shape.with_attention(lowering.request.layer)
    weights = encoder_weight_bytes(shape, lowering)
    linear = lowering.scheme.linear
    block = _BLOCK_BYTES["primitive" if lowering.attention == "primitive" else "standard"]
    block += _QUANTISED_BYTES[linear.bits] * len(shape.linears()) if linear else 0
    graph = shape.num_layers * block
    is_text = isinstance(shape.input, TokenInput)
    tokens = _PROOF_TOKENS if is_text else _PROOF_IMAGES * shape.max_context
    work = work_bytes(shape, lowering.scheme, DTYPE_BYTES[lowering.dtype])
    golden = tokens * (shape.num_layers + 2) * shape.hidden_size * 4
    scheme, text = lowering.scheme, (calibration_windows, window_length(shape, lowering.context))
    memory = _BASE_MEMORY + _BYTES_PER_WEIGHT * shape.num_parameters
    memory += calibration_bytes(shape, scheme, *text)
    seconds = {"start": _START_S, "trace": _TRACE_S, "weights": weights / _WRITTEN_BYTES_PER_S}
    if verify:
        seconds["torch reference"] = shape.num_parameters / _REFERENCE_PER_S
        seconds["ONNX Runtime"] = shape.num_parameters / _ONNXRUNTIME_PER_S
    seconds.update(calibration_seconds(shape, scheme, *text))
    if verify and tensorrt and lowering.rtx_sm is not None:
        seconds["TensorRT-RTX"] = _RTX_START_S + _RTX_BLOCK_S * shape.num_layers
    if training_steps is not None:
        blocks = shape.num_layers * sum(n * k for n, k in shape.linears().values())
        seconds["distilling"] = training_steps * blocks * _STEP_TOKENS / _TRAINED_PER_S
        # Two models, gradients, and the two moments of AdamW, which are on disk too.
        memory += 4 * (5 * blocks + shape.num_parameters)
        disk = 3 * 4 * blocks
    return Estimate(
        weight_bytes=weights,
        graph_bytes=graph,
        disk_bytes=disk + weights + graph + _SMALL_BYTES + (golden if verify else 0) + work,
        memory_bytes=int(memory),
        cache_bytes_per_token=0,
        cache_bytes=0,
        context=lowering.context or shape.max_context,
        batch=lowering.batch,
        seconds=seconds,
    )
