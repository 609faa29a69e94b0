"""What goes with layers of linear attention, and what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgeattn.attention import AttentionRequest, LionRequest, RecurrentRequest
from edgeattn.errors import LoweringError
from edgeattn.recurrent import Recurrent
from edgeattn.shape import ModelShape

if TYPE_CHECKING:
    from edgeattn.planner.lowering import Lowering


def check_attention_kind(request: AttentionRequest, shape: ModelShape) -> None:
    """Refuses `recurrent` for a model of softmax attention, and the other variants for its own.

    Raises:
        LoweringError: the request does not fit the model's layers.
    """
    if isinstance(request, LionRequest):
        raise LoweringError(
            expected=f"an encoder, for {request.label}: each token sees those behind it too",
            came=f"family {shape.family} is a decoder",
            todo="leave out --attention",
        )
    asks = isinstance(request, RecurrentRequest)
    if asks and not shape.is_recurrent:
        raise LoweringError(
            expected="a checkpoint whose layers are linear attention, for --attention recurrent",
            came=f"family {shape.family} has softmax attention in every layer",
            todo="leave out --attention: no export turns one into the other",
        )
    if not asks and shape.is_recurrent:
        raise LoweringError(
            expected=f"a model of softmax attention, for {request.label}",
            came=f"layers of family {shape.family} are linear attention, which has no keys",
            todo=f"leave out --attention {request.label}",
        )


def state_flops(shape: ModelShape) -> int:
    """Operations on the states of linear attention for one token, over all layers.

    Three products of a vector with the state: what it knows of the key, the update, the output.
    """
    numbers = sum(
        count * kind.attention.state_numbers
        for kind, count in shape.kind_counts.items()
        if isinstance(kind.attention, Recurrent)
    )
    return 6 * numbers


def fit_recurrent(lowering: Lowering, shape: ModelShape) -> Lowering:
    """The lowering of a model with layers of linear attention.

    Keys of its softmax layers are packed, so that padding is on the right of new tokens in every
    layer.

    Raises:
        LoweringError: a static cache, or a scheme that is calibrated or rotates.
    """
    if lowering.kv_cache == "static":
        raise LoweringError(
            expected="a growing cache for a model with linear attention, whose state has one size",
            came="--kv-cache is static",
            todo="leave out --kv-cache",
        )
    scheme = lowering.scheme
    if scheme.needs_calibration or scheme.rotation != "none":
        does = "rotates" if scheme.rotation != "none" else "is calibrated on a text"
        raise LoweringError(
            expected="a scheme that rounds weights to nearest, for a model with linear attention",
            came=f"scheme {scheme.label} {does}, which knows projections of softmax attention only",
            todo="choose w8-rtn or w4-rtn",
        )
    form = "standard" if lowering.attention == "group-query" else lowering.attention
    return replace(lowering, attention=form, kv_cache="packed")
