"""What an export will take before it is started: bytes on disk and in memory, seconds by stage.

Sizes follow from the shape; memory and time are rates times sizes. The rates were measured with
whole exports on a server of 2 cores (AMD EPYC, Zen 5, 24 GB; torch 2.13 for CPUs, ONNX Runtime
1.31, TensorRT-RTX 1.7), each figure the best of two or three runs: SmolLM2-135M and a random Llama
of 333 million weights, both from fp16 safetensors; schemes none, w8-rtn and w4-rtn; targets cpu
(fp32) and jetson-orin (fp16). Peak memory came out within 17 % of these estimates. Where other
processes want the cores, an export took up to ten times as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from edgeattn.attention import FftRopeRequest
from edgeattn.planner.attention_calibration import attention_bytes, attention_seconds
from edgeattn.planner.calibration import (
    calibration_bytes,
    calibration_seconds,
    learning_bytes,
    window_length,
    work_bytes,
)
from edgeattn.planner.group_query import Regrouping
from edgeattn.planner.lowering import Lowering
from edgeattn.planner.memory import (
    DTYPE_BYTES,
    cache_bytes_per_token,
    rotary_bytes,
    state_bytes,
    stored_shape,
    table_formats,
    weight_bytes,
)
from edgeattn.quant.scheme import WeightFormat
from edgeattn.shape import ModelShape

MEASURED_ON = "a 2-core server"

# Every tensor of the weights file begins at such an offset (exporters.weights).
_PAGE = 4096

# model.onnx: bytes per block by spelling of attention, and per quantised matrix by bits.
_BLOCK_BYTES = {"standard": 6250, "primitive": 8500, "group-query": 2700}
_QUANTISED_BYTES = {8: 660, 4: 460}
_GRAPH_BYTES = 2500
# Nodes per block that round what its linear layers read, hold its cache as int8, and rotate.
_ROUNDED_BYTES, _INT8_CACHE_BYTES, _ROTATION_BYTES = 2090, 1130, 490
# The function of a Hadamard transform, and numbers of its two factors by the width: K^2 + M^2.
_HADAMARD_BYTES, _HADAMARD_NUMBERS = 1000, 2.2

# golden/: what the proof runs (verify.cases): tokens, forward passes, and tokens whose logits are
# kept where the graph gives only the last one's. npz leaves 91 % of random mantissas.
PROOF_TOKENS, PROOF_STEPS, PROOF_LAST_TOKENS, PROOF_CASES, PROOF_ROWS = 67, 23, 26, 3, 4
_NPZ_RATIO, _NPZ_ENTRY_BYTES = 0.91, 230
# What the ragged case of an attention variant has more, in two rows.
_RAGGED_TOKENS = 20

# Manifest, configurations and report; of these with a proof, and per block.
_SMALL_BYTES, _REPORT_BYTES, _REPORT_BLOCK_BYTES = 33_000, 8_000, 1_010

# Resident bytes once torch, onnxscript and a traced block are there.
_BASE_MEMORY = 431_000_000
RTX_BASE_MEMORY = 260_000_000

# Seconds: imports, tracing one block, and what each further step does in a second.
_START_S, _TRACE_S = 2.1, 3.4
_WRITTEN_BYTES_PER_S = 300e6  # read, cast, hashed and written
_QUANTISED_PER_S = 45e6  # weights whose scales are chosen by least error
_REFERENCE_PER_S = {"fp32": 38e6, "fp16": 80e6, "bf16": 80e6}  # weights, torch in both precisions
_ONNXRUNTIME_PER_S = {16: 60e6, 8: 27e6, 4: 40e6}  # weights, by bits of the linear layers
_RTX_START_S, _RTX_BLOCK_S = 0.6, 0.28


@dataclass(frozen=True)
class Estimate:
    """What an export is expected to take; sizes in bytes.

    Attributes:
        weight_bytes: the weights file.
        graph_bytes: model.onnx.
        disk_bytes: the whole bundle, and finished layers beside it until it is there.
        memory_bytes: resident at the peak of the largest process.
        cache_bytes_per_token: keys and values of one token, over all layers.
        cache_bytes: the whole cache, at `context` tokens in each of `batch` rows.
        context: longest sequence in tokens.
        batch: rows.
        seconds: by stage, on `MEASURED_ON`.
    """

    weight_bytes: int
    graph_bytes: int
    disk_bytes: int
    memory_bytes: int
    cache_bytes_per_token: int
    cache_bytes: int
    context: int
    batch: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        seconds = {stage: round(value, 1) for stage, value in self.seconds.items()}
        return {**asdict(self), "seconds": seconds, "seconds_measured_on": MEASURED_ON}


def estimate(
    shape: ModelShape,
    lowering: Lowering,
    *,
    text_bytes: int = 0,
    verify: bool = True,
    tensorrt: bool = False,
    calibration_windows: int = 0,
    learns: bool = True,
    regrouped: Regrouping | None = None,
) -> Estimate:
    """What exporting a model of `shape` takes.

    Args:
        shape: the architecture.
        lowering: what was decided (`fit_lowering`).
        text_bytes: of the tokenizer's files, which are copied.
        verify: whether the bundle is proven.
        tensorrt: whether TensorRT-RTX is there to build it.
        calibration_windows: of the text, for a scheme that needs one.
        learns: learned rotations are not given in a file.
        regrouped: what other numbers of heads and recovery training take; None for neither.
    """
    tensorrt = tensorrt and verify and lowering.rtx_sm is not None
    scheme = lowering.scheme
    seconds = _seconds(shape, lowering, verify=verify, tensorrt=tensorrt)
    memory = _memory(shape, lowering, verify=verify, tensorrt=tensorrt)
    if scheme.needs_calibration:
        text = (calibration_windows, window_length(shape, lowering.context))
        seconds.update(calibration_seconds(shape, scheme, *text, learns=learns))
        table = 13 * shape.vocab_size * shape.hidden_size
        streams = calibration_bytes(shape, scheme, *text)
        learning = learning_bytes(shape, text[1]) if "learning" in seconds else 0
        memory = max(memory, _BASE_MEMORY + max(table + streams, learning))
    request = lowering.request
    if request is not None and request.needs_calibration:
        asked = (shape, lowering.context, calibration_windows)
        seconds["attention variant"] = attention_seconds(request, *asked)
        memory = max(memory, _BASE_MEMORY + attention_bytes(request, *asked))
    if regrouped is not None:
        seconds.update(regrouped.seconds)
        memory = max(memory, _BASE_MEMORY + regrouped.memory_bytes)
    context = lowering.context or shape.max_context
    per_token = cache_bytes_per_token(shape, lowering)
    weights = weight_file_bytes(shape, lowering)
    graph = graph_bytes(shape, lowering)
    disk = weights + graph + text_bytes + _SMALL_BYTES
    disk += work_bytes(shape, scheme, DTYPE_BYTES[lowering.dtype], learns=learns)
    disk += 0 if regrouped is None else regrouped.work_bytes
    if verify:
        disk += golden_bytes(shape, lowering)
        disk += _REPORT_BYTES + _REPORT_BLOCK_BYTES * shape.num_layers
    return Estimate(
        weight_bytes=weights,
        graph_bytes=graph,
        disk_bytes=disk,
        memory_bytes=memory,
        cache_bytes_per_token=per_token,
        cache_bytes=per_token * context * lowering.batch,
        context=context,
        batch=lowering.batch,
        seconds=seconds,
    )


def weight_file_bytes(shape: ModelShape, lowering: Lowering) -> int:
    """Bytes of the weights file with the padding between its tensors."""
    shape = stored_shape(shape, lowering)
    padding = sum(-size % _PAGE for size in _tensor_bytes(shape, lowering))
    return weight_bytes(shape, lowering) + padding


def _tensor_bytes(shape: ModelShape, lowering: Lowering) -> Iterator[int]:
    """Bytes of each stored tensor; those that are no matrices counted as vectors of hidden_size."""
    wide = DTYPE_BYTES[lowering.dtype]
    format_of = lowering.scheme.format_of
    matrices = [
        (n, k, format_of(name))
        for kind, count in shape.kind_counts.items()
        for name, (n, k) in shape.linears(kind).items()
        for _ in range(count)
    ]
    table = (shape.vocab_size, shape.hidden_size)
    matrices += [(*table, format) for format in table_formats(shape, lowering)]
    vectors = shape.num_parameters - sum(n * k for n, k, _ in matrices)
    for outputs, inputs, format in matrices:
        yield from _matrix_parts(outputs, inputs, format, wide)
    yield from [shape.hidden_size * wide] * (vectors // shape.hidden_size)
    yield rotary_bytes(shape, lowering)


def _matrix_parts(
    outputs: int, inputs: int, format: WeightFormat | None, wide: int
) -> tuple[int, ...]:
    """Bytes of the weights, or of the integers, scales and, at 8 bits, zero points."""
    if format is None:
        return (outputs * inputs * wide,)
    scales = outputs * (inputs // format.group_size if format.group_size else 1)
    parts = ((outputs * inputs * format.bits + 7) // 8, scales * wide)
    return (*parts, scales) if format.bits == 8 else parts


def graph_bytes(shape: ModelShape, lowering: Lowering) -> int:
    """Bytes of model.onnx."""
    shape, linear = stored_shape(shape, lowering), lowering.scheme.linear
    block = _BLOCK_BYTES[lowering.attention]
    block += _QUANTISED_BYTES[linear.bits] * len(shape.linears()) if linear else 0
    more, shared = _run_time_bytes(shape, lowering)
    return int(_GRAPH_BYTES + (block + more) * shape.num_layers + shared)


def _run_time_bytes(shape: ModelShape, lowering: Lowering) -> tuple[float, float]:
    """Bytes per block, and for all, of what is rounded or rotated when the graph runs."""
    scheme, block = lowering.scheme, 0.0
    rotated = []
    if scheme.activation_bits is not None:
        block += _ROUNDED_BYTES
    if scheme.kv_bits is not None:
        block += _INT8_CACHE_BYTES
        rotated.append(shape.head_dim)
    if scheme.online:
        rotated.append(shape.intermediate_size)
    if scheme.rotation == "none" or not rotated:
        return block, 0
    numbers = _HADAMARD_NUMBERS * sum(rotated) * DTYPE_BYTES[lowering.dtype]
    return block + _ROTATION_BYTES * len(rotated), _HADAMARD_BYTES + numbers


def golden_bytes(shape: ModelShape, lowering: Lowering) -> int:
    """Bytes of the golden vectors of a context that holds the whole proof."""
    layers, more = shape.num_layers, _more_tokens(shape, lowering)
    tokens = PROOF_TOKENS + more
    logit_rows = tokens if lowering.logits == "all" else PROOF_LAST_TOKENS
    numbers = tokens * shape.hidden_size * (layers + 1)
    numbers += tokens * shape.kv_size * 2 * shape.caching_layers
    numbers += PROOF_ROWS * state_bytes(shape, lowering) // 4
    numbers += logit_rows * shape.vocab_size
    arrays = PROOF_STEPS * (layers + 5) + PROOF_CASES * 2 * layers
    return int(numbers * 4 * _NPZ_RATIO) + arrays * _NPZ_ENTRY_BYTES


def _more_tokens(shape: ModelShape, lowering: Lowering) -> int:
    """Tokens that the proof of an attention variant runs besides."""
    request = lowering.request
    if request is None and not shape.is_recurrent:
        return 0
    exact = request.sink + request.window if isinstance(request, FftRopeRequest) else 0
    return exact + _RAGGED_TOKENS


def _memory(shape: ModelShape, lowering: Lowering, *, verify: bool, tensorrt: bool) -> int:
    """Peak of the largest process; the largest matrix is nearly always the embedding.

    Weights are read one by one, so that only the proof holds the whole model: in ONNX Runtime,
    which takes fp16 weights into fp32 on a CPU, and in TensorRT-RTX's builder.
    """
    quantised = lowering.scheme.embedding is not None
    wide = lowering.dtype == "fp32"
    largest = _largest_matrix(shape)
    stored = weight_bytes(shape, lowering)
    # Bytes per weight of the largest matrix, its source in 2 bytes among them.
    peaks = [_BASE_MEMORY + (3.3 if quantised else 6 if wide else 2) * largest]
    if verify:
        peaks.append(_BASE_MEMORY + (12 if wide else 7) * largest)
        if quantised:
            peaks.append(_BASE_MEMORY + 13 * largest + 1.3 * stored)
        else:
            peaks.append(_BASE_MEMORY + (6.5 * largest + stored if wide else 3 * stored))
    if tensorrt:
        peaks.append(tensorrt_build_bytes(shape, lowering))
    return int(max(peaks))


def _largest_matrix(shape: ModelShape) -> int:
    linears = [size for kind in shape.layer_kinds for size in shape.linears(kind).values()]
    return max(shape.vocab_size * shape.hidden_size, *(n * k for n, k in linears))


def tensorrt_build_bytes(shape: ModelShape, lowering: Lowering) -> int:
    """Memory of the process that builds an engine, as measured with TensorRT-RTX."""
    stored = weight_bytes(shape, lowering)
    largest = _largest_matrix(shape)
    quantised = lowering.scheme.embedding is not None
    return int(RTX_BASE_MEMORY + (15 if quantised else 22) * largest + 1.5 * stored)


def _seconds(
    shape: ModelShape, lowering: Lowering, *, verify: bool, tensorrt: bool
) -> dict[str, float]:
    """Seconds by stage; the proof reads and quantises every weight anew, a tied table twice."""
    scheme = lowering.scheme
    blocks = shape.linear_weights
    table = shape.vocab_size * shape.hidden_size
    tables = table if shape.tied_embeddings else 2 * table
    linears = blocks if scheme.linear else 0
    quantised = linears + (tables if scheme.embedding else 0)
    written = weight_bytes(shape, lowering) / _WRITTEN_BYTES_PER_S
    seconds = {
        "start": _START_S,
        "trace": _TRACE_S,
        "weights": written + quantised / _QUANTISED_PER_S,
    }
    if verify:
        again = linears + (2 * table if scheme.embedding else 0)
        reference = shape.num_parameters / _REFERENCE_PER_S[lowering.dtype]
        seconds["torch reference"] = reference + again / _QUANTISED_PER_S
        bits = scheme.linear.bits if scheme.linear else 16
        seconds["ONNX Runtime"] = shape.num_parameters / _ONNXRUNTIME_PER_S[bits]
    if tensorrt:
        seconds["TensorRT-RTX"] = _RTX_START_S + _RTX_BLOCK_S * shape.num_layers
    return seconds
