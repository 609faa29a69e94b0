"""What quantising on a text takes, in proportion to SmolLM2-135M on a 2-core server."""

from __future__ import annotations

from edgeattn.encoder_shape import AnyShape, EncoderShape
from edgeattn.quant.scheme import Scheme, WeightFormat
from edgeattn.recipe import CALIBRATION_LENGTH
from edgeattn.shape import ModelShape

# Weights of the blocks times tokens in a second: statistics of a layer's inputs, those of the
# original network beside them, one pass through the blocks, and a step of learning.
_OBSERVED_PER_S, _REFIT_PER_S = 32e9, 40e9
_FORWARD_PER_S, _LEARNED_PER_S = 18e9, 7.3e9
_GPTQ_PER_S = 3.3e6  # weights
_LEARNED_TOKENS = 1024  # in a step
# Tokens of an encoder's windows: about those of the texts it reads, and attention is quadratic.
ENCODER_LENGTH = 128
_MATRICES = 7  # K x K in fp64 at once
_LOGITS = 3  # of a window at once: themselves, their logarithms, gradients


def window_length(shape: AnyShape, context: int | None) -> int:
    """Tokens of a calibration window.

    Args:
        shape: the architecture.
        context: of the bundle; None takes the checkpoint's own.
    """
    longest = ENCODER_LENGTH if isinstance(shape, EncoderShape) else CALIBRATION_LENGTH
    return min(longest, context or shape.max_context)


def calibration_seconds(
    shape: AnyShape, scheme: Scheme, windows: int, length: int, *, learns: bool = True
) -> dict[str, float]:
    """Seconds by stage, beside those of an export without a text.

    Args:
        shape: the architecture.
        scheme: what is done; nothing for one that needs no text.
        windows: of the calibration text.
        length: tokens of each.
        learns: learned rotations are not given in a file.

    Returns:
        Empty for a scheme that needs no text.
    """
    if not scheme.needs_calibration:
        return {}
    weights = _block_weights(shape)
    work = weights * windows * length
    seconds = work / _OBSERVED_PER_S + (work / _REFIT_PER_S if scheme.refit else 0)
    if scheme.method == "gptq":
        seconds += weights / _GPTQ_PER_S
    found = {"calibration": _candidates(scheme, learns) * seconds}
    if scheme.keep > 0:
        # Each trial passes through the layers behind it, half of all on average, with one window.
        passes = _candidates(scheme, learns) * _trials(shape, scheme) / 2
        found["sensitivity"] = passes * weights * length / _FORWARD_PER_S
    if scheme.rotation == "learned" and learns:
        found["learning"] = scheme.steps * weights * _LEARNED_TOKENS / _LEARNED_PER_S
    return found


def calibration_bytes(shape: AnyShape, scheme: Scheme, windows: int, length: int) -> int:
    """Memory of the windows on their way through a layer, and of K x K statistics there.

    Or of the residual streams behind all trials of sensitivity, where those take more.

    Args:
        shape: the architecture.
        scheme: what is done; nothing for one that needs no text.
        windows: of the calibration text.
        length: tokens of each.
    """
    if not scheme.needs_calibration:
        return 0
    widest = max(inputs for _, inputs in shape.linears().values())
    measured = scheme.method == "gptq" or scheme.refit
    statistics = _MATRICES * 8 * widest**2 if measured else 0
    width = shape.hidden_size + shape.q_size + shape.intermediate_size
    layers = 4 * windows * length * width * (2 if scheme.refit else 1) + statistics
    trials = 4 * _trials(shape, scheme) * length * shape.hidden_size if scheme.keep > 0 else 0
    return max(layers, trials)


def learning_bytes(shape: ModelShape, length: int) -> int:
    """Memory of learning rotations: the whole model in fp32, and what gradients need.

    All blocks and one twice more, embedding and head; the residual stream before each block, and
    the logits of one window.
    """
    blocks, table = _block_weights(shape), shape.vocab_size * shape.hidden_size
    numbers = blocks + 2 * blocks // shape.num_layers + 2 * table
    numbers += _LEARNED_TOKENS * shape.hidden_size * shape.num_layers
    return 4 * (numbers + _LOGITS * length * shape.vocab_size)


def work_bytes(shape: AnyShape, scheme: Scheme, wide: int, *, learns: bool = True) -> int:
    """Disk for finished layers, until what they are for is there: a byte for every weight.

    Args:
        shape: the architecture.
        scheme: what is done; nothing for one that needs no text.
        wide: bytes of a scale.
        learns: learned rotations are not given in a file.
    """
    if not scheme.needs_calibration:
        return 0

    def stored(outputs: int, inputs: int, format: WeightFormat | None) -> int:
        group = format.group_size if format is not None and format.group_size else inputs
        return outputs * inputs + outputs * (inputs // group) * wide

    layer = sum(stored(n, k, scheme.format_of(name)) for name, (n, k) in shape.linears().items())
    head = 0
    if scheme.small_head and isinstance(shape, ModelShape):
        head = stored(shape.vocab_size, shape.hidden_size, scheme.head)
    # As they are while they are learned, and as they were found.
    matrices = shape.hidden_size**2 + shape.num_layers * shape.head_dim**2
    rotations = 2 * 8 * matrices if scheme.rotation == "learned" and learns else 0
    return _candidates(scheme, learns) * (shape.num_layers * layer + head) + rotations


def _block_weights(shape: AnyShape) -> int:
    return shape.num_layers * sum(n * k for n, k in shape.linears().values())


def _candidates(scheme: Scheme, learns: bool) -> int:
    """How often the model is quantised: where rotations are compared, twice."""
    return 2 if scheme.rotation == "auto" or (scheme.rotation == "learned" and learns) else 1


def _trials(shape: AnyShape, scheme: Scheme) -> int:
    """Of sensitivity: one for each input that is rounded, or for each linear layer."""
    return shape.num_layers * (4 if scheme.activation_bits is not None else 7)
