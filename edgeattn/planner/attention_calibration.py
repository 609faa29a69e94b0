"""What measuring heads and training routers takes, in proportion to SmolLM2-135M on 2 cores."""

from __future__ import annotations

from edgeattn.attention import FftRopeRequest, LayerRequest
from edgeattn.planner.calibration import window_length
from edgeattn.recipe import CALIBRATION_LENGTH
from edgeattn.shape import ModelShape

# Tokens of a window that shows far keys.
FAR_LENGTH = 2048
# Weights of the blocks times tokens in a second, and scores of all heads.
_FORWARD_PER_S, _SCORES_PER_S = 36e9, 130e6
# Streams of all windows that are there at once, and score matrices of some rows.
_STREAMS, _SCORE_MATRICES, _ROWS = 6, 10, 256


def attention_text(
    request: LayerRequest, shape: ModelShape, context: int | None, windows: int
) -> tuple[int, int]:
    """Windows of the calibration text, and tokens of each.

    Args:
        request: what is asked for.
        shape: the architecture.
        context: of the bundle; None takes the checkpoint's own.
        windows: of 512 tokens, that were asked for; longer ones are as many tokens.
    """
    if not isinstance(request, FftRopeRequest):
        return windows, window_length(shape, context)
    length = min(FAR_LENGTH, context or shape.max_context)
    return max(2, windows * CALIBRATION_LENGTH // length), length


def attention_seconds(
    request: LayerRequest, shape: ModelShape, context: int | None, windows: int
) -> float:
    """Seconds of calibrating a variant; see `attention_text` for the arguments."""
    count, length = attention_text(request, shape, context, windows)
    weights = shape.num_layers * sum(n * k for n, k in shape.linears().values())
    seconds = weights * count * length / _FORWARD_PER_S
    if isinstance(request, FftRopeRequest):
        seconds += count * length**2 * shape.num_heads * shape.num_layers / _SCORES_PER_S
    return seconds


def attention_bytes(
    request: LayerRequest, shape: ModelShape, context: int | None, windows: int
) -> int:
    """Memory of calibrating a variant beside one layer; see `attention_text` for the arguments."""
    count, length = attention_text(request, shape, context, windows)
    found = 4 * count * length * _STREAMS * max(shape.hidden_size, shape.q_size)
    if isinstance(request, FftRopeRequest):
        found += 4 * _SCORE_MATRICES * shape.num_heads * _ROWS * length
    return found
