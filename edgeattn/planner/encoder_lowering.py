"""`fit_encoder_lowering`: which graph of a recipe an encoder gets on a target. Pure."""

from __future__ import annotations

from dataclasses import replace

from edgeattn.attention import LionRequest
from edgeattn.devices.registry import Target
from edgeattn.encoder_shape import AnyShape, EncoderShape, PatchInput
from edgeattn.errors import LoweringError
from edgeattn.planner.lowering import (
    Lowering,
    check_groups,
    check_rotated,
    fit_head_dim,
    fit_lowering,
)
from edgeattn.quant.scheme import Scheme


def fit_encoder_lowering(lowering: Lowering, shape: EncoderShape, target: Target) -> Lowering:
    """The lowering for one encoder: refused, or with what depends on it settled.

    Args:
        lowering: of `plan_lowering`.
        shape: the architecture.
        target: for what.

    Raises:
        LoweringError: the recipe asks for what only decoders have, a group does not divide a width,
            a width cannot be rotated, or the context exceeds the checkpoint's.
    """
    _refuse_decoding(lowering, shape)
    check_groups(lowering.scheme, shape.linears())
    check_rotated(lowering.scheme, shape)
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
    # Which layers to keep is chosen by the loss of the next token.
    plain = replace(plain, scheme=replace(lowering.scheme, keep=0.0))
    return fit_head_dim(plain, shape.head_dim, target.software.graph)


def fit_any_lowering(lowering: Lowering, shape: AnyShape, target: Target) -> Lowering:
    """`fit_encoder_lowering` or `fit_lowering`, as the model is one or the other."""
    if isinstance(shape, EncoderShape):
        return fit_encoder_lowering(lowering, shape, target)
    return fit_lowering(lowering, shape, target)


def _refuse_decoding(lowering: Lowering, shape: EncoderShape) -> None:
    """Refuses what an encoder has no use for, or cannot have."""
    scheme = lowering.scheme
    asked = {
        "--kv-cache static": lowering.kv_cache == "static",
        "--logits last": lowering.logits == "last",
        f"--quant {scheme.label} (int8 cache)": scheme.kv_bits is not None,
        f"--quant {scheme.label} (LM head)": scheme.small_head,
        f"--quant {scheme.label} (judged by the next token)": _needs_next_token(scheme),
        f"--attention {lowering.variant}": not isinstance(lowering.request, LionRequest | None),
    }
    for what, given in asked.items():
        if given:
            raise LoweringError(
                expected=f"a decoder, for {what}",
                came=f"family {shape.family} is an encoder",
                todo="leave it out",
            )


def _needs_next_token(scheme: Scheme) -> bool:
    """Whether something is asked for that is learned, or chosen, by the loss of the next token."""
    keeps = any(setting.startswith("keep=") for setting in scheme.settings)
    return scheme.rotation in ("auto", "learned") or (keeps and scheme.keep > 0)
