"""`fit_encoder_lowering`: which graph of a recipe an encoder gets on a target. Pure."""

from __future__ import annotations

from dataclasses import replace

from edgeattn.attention import LionRequest
from edgeattn.devices.registry import Target
from edgeattn.encoder_shape import EncoderShape, PatchInput
from edgeattn.errors import LoweringError
from edgeattn.planner.lowering import Lowering, check_groups, fit_head_dim


def fit_encoder_lowering(lowering: Lowering, shape: EncoderShape, target: Target) -> Lowering:
    """The lowering for one encoder: refused, or with what depends on it settled.

    Args:
        lowering: of `plan_lowering`.
        shape: the architecture.
        target: for what.

    Raises:
        LoweringError: the recipe asks for what only decoders have, a group does not divide a width,
            or the context exceeds the checkpoint's.
    """
    _refuse_decoding(lowering, shape)
    check_groups(lowering.scheme, shape.linears())
    context = lowering.context
    if context is not None and isinstance(shape.input, PatchInput):
        raise LoweringError(
            expected=f"no --context: an image is always {shape.max_context} tokens",
            came=f"it is {context}",
            todo="leave it out",
        )
    if context is not None and context > shape.max_context:
        raise LoweringError(
            expected=f"a context of at most {shape.max_context} tokens, which the checkpoint knows",
            came=f"--context is {context}",
            todo="ask for less",
        )
    # ONNX Runtime's operator for decoders is causal; there is no cache.
    spelling = "standard" if lowering.attention == "group-query" else lowering.attention
    plain = replace(lowering, attention=spelling, kv_cache="concat")
    return fit_head_dim(plain, shape.head_dim, target.software.graph)


def _refuse_decoding(lowering: Lowering, shape: EncoderShape) -> None:
    """Refuses what an encoder has no use for, or cannot have yet."""
    scheme = lowering.scheme
    asked = {
        "--kv-cache static": lowering.kv_cache == "static",
        "--logits last": lowering.logits == "last",
        f"--quant {scheme.label} (int8 cache)": scheme.kv_bits is not None,
        f"--attention {lowering.variant}": not isinstance(lowering.request, LionRequest | None),
    }
    for what, given in asked.items():
        if given:
            raise LoweringError(
                expected=f"a decoder, for {what}",
                came=f"family {shape.family} is an encoder",
                todo="leave it out",
            )
    if scheme.needs_calibration or scheme.rotation != "none":
        raise LoweringError(
            expected="a scheme that rounds each weight to the nearest, for an encoder",
            came=f"{scheme.label} rotates or is calibrated on a text",
            todo="choose w8-rtn or w4-rtn",
        )
