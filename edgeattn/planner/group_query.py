"""A model whose heads are regrouped: its shape, which numbers it can have, what making it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgeattn.attention import GroupQueryRequest
from edgeattn.errors import LoweringError
from edgeattn.planner.calibration import window_length
from edgeattn.planner.recurrent import check_attention_kind
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

# Weights of the blocks times tokens in a second, as in `edgeattn.planner.calibration`.
_FORWARD_PER_S, _TRAINED_PER_S = 18e9, 7.3e9
# Windows of the text that are run through the model, at most: to compare heads, and four times
# those that judge each step.
_WINDOWS, _PASSES, _JUDGED = 16, 4, 8
_STEP_TOKENS = 256


@dataclass(frozen=True)
class Regrouping:
    """What regrouping, and the recovery training of any lossy attention, take.

    Attributes:
        seconds: by stage.
        memory_bytes: at the peak.
        work_bytes: of disk until the bundle is there.
    """

    seconds: dict[str, float]
    memory_bytes: int
    work_bytes: int


def regrouping(shape: ModelShape, recipe: Recipe, context: int | None) -> Regrouping | None:
    """What regrouping and recovery training take beside the rest of an export; None for neither.

    Args:
        shape: of the checkpoint.
        recipe: for the numbers of heads and the training.
        context: of the bundle; None takes the checkpoint's own.
    """
    if recipe.group_query is None and recipe.finetune_steps is None:
        return None
    weights = shape.num_layers * sum(n * k for n, k in shape.linears().values())
    table = shape.vocab_size * shape.hidden_size
    tokens = (_WINDOWS + _PASSES * _JUDGED) * window_length(shape, context)
    seconds = {}
    if recipe.group_query is not None:
        seconds["regrouping"] = weights * tokens / _FORWARD_PER_S
    memory, disk = 4 * (2 * table + weights // shape.num_layers + tokens * shape.hidden_size), 0
    if recipe.finetune_steps is not None:
        trained = recipe.finetune_steps * weights * _STEP_TOKENS
        seconds["recovery training"] = trained / _TRAINED_PER_S
        # Two models, gradients, and the two moments of AdamW; logits of a step five times.
        memory = 4 * (5 * weights + 2 * table + 5 * _STEP_TOKENS * shape.vocab_size)
        memory += 4 * _STEP_TOKENS * shape.num_layers * 4 * shape.intermediate_size
        disk = 3 * 4 * weights
    return Regrouping(seconds, memory, disk)


def regrouped_shape(shape: ModelShape, request: GroupQueryRequest | None) -> ModelShape:
    """The shape with the numbers of heads that were asked for.

    Args:
        shape: of the checkpoint.
        request: None leaves it as it is.

    Raises:
        LoweringError: numbers that do not divide, or that are those of the checkpoint, or a model
            of linear attention.
    """
    if request is None:
        return shape
    check_attention_kind(request, shape)
    kv_heads = request.kv_heads or shape.num_kv_heads
    heads = request.heads or shape.num_heads
    there = f"{shape.num_heads} query and {shape.num_kv_heads} KV heads"
    if heads > shape.num_heads:
        raise LoweringError(
            expected=f"at most {shape.num_heads} query heads, which the model has",
            came=f"{request.label} asks for {heads}",
            todo="ask for fewer",
        )
    if shape.num_heads % kv_heads or heads % kv_heads:
        raise LoweringError(
            expected="a number of KV heads that divides the query heads, before and after",
            came=f"{request.label} makes {heads} on {kv_heads} of {there}",
            todo=f"ask for kv_heads={_choices(shape.num_heads, heads)}",
        )
    if (heads, kv_heads) == (shape.num_heads, shape.num_kv_heads):
        raise LoweringError(
            expected="other numbers of heads than the model's",
            came=f"it has {there} already",
            todo="leave out --attention gqa",
        )
    return replace(shape, num_heads=heads, num_kv_heads=kv_heads)


def _choices(before: int, after: int) -> str:
    """The numbers of KV heads that fit."""
    fitting = [str(k) for k in range(1, after + 1) if before % k == 0 and after % k == 0]
    return " or ".join(fitting)
