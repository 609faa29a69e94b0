"""What quantising on a text takes, in proportion to SmolLM2-135M on a 2-core server."""

from __future__ import annotations

from edgeattn.quant.scheme import Scheme
from edgeattn.shape import ModelShape

WINDOW_TOKENS = 512

# Weights of the blocks times tokens in a second: statistics of a layer's inputs, those of the
# original network beside them, one pass through the blocks, and a step of learning.
_OBSERVED_PER_S, _REFIT_PER_S = 32e9, 40e9
_FORWARD_PER_S, _LEARNED_PER_S = 18e9, 7.3e9
_GPTQ_PER_S = 3.3e6  # weights
_LEARNED_TOKENS = 1024  # in a step
_MATRICES = 7  # K x K in fp64 at once


def calibration_seconds(shape: ModelShape, scheme: Scheme, windows: int) -> dict[str, float]:
    """Seconds by stage, beside those of an export without a text.

    Args:
        shape: the architecture.
        scheme: empty for one that needs no text.
        windows: of the calibration text.
    """
    if not scheme.needs_calibration:
        return {}
    weights = shape.num_layers * sum(n * k for n, k in shape.linears().values())
    work = weights * windows * min(WINDOW_TOKENS, shape.max_context)
    seconds = work / _OBSERVED_PER_S + (work / _REFIT_PER_S if scheme.refit else 0)
    if scheme.method == "gptq":
        seconds += weights / _GPTQ_PER_S
    found = {"calibration": seconds}
    if scheme.keep > 0:
        # Each trial passes through the layers behind it, half of all on average, with one window.
        trials = shape.num_layers * (4 if scheme.activation_bits is not None else 7)
        found["sensitivity"] = trials / 2 * weights * WINDOW_TOKENS / _FORWARD_PER_S
    if scheme.rotation == "learned":
        found["learning"] = scheme.steps * weights * _LEARNED_TOKENS / _LEARNED_PER_S
    return found


def calibration_bytes(shape: ModelShape, scheme: Scheme, windows: int) -> int:
    """Memory of the windows on their way through a layer, and of K x K statistics there."""
    if not scheme.needs_calibration:
        return 0
    widest = max(inputs for _, inputs in shape.linears().values())
    measured = scheme.method == "gptq" or scheme.refit
    statistics = _MATRICES * 8 * widest**2 if measured else 0
    width = shape.hidden_size + shape.q_size + shape.intermediate_size
    tokens = windows * min(WINDOW_TOKENS, shape.max_context)
    return 4 * tokens * width * (2 if scheme.refit else 1) + statistics
