"""`plan`: what a model costs on a target, and which heads would cost less. Arithmetic, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgeattn.devices.registry import Target, parse_target
from edgeattn.errors import LoweringError, UsageError
from edgeattn.planner.attention_gains import AttentionGains, attention_gains
from edgeattn.planner.cost import (
    Heads,
    PaperCost,
    StepCost,
    Tradeoff,
    candidate_heads,
    paper_cost,
    step_cost,
    with_heads,
)
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.planner.published_heads import (
    HEAD_WIDTH,
    REFERENCE_LOSSES,
    PublishedHeads,
    published_heads,
    reference_size,
)
from edgeattn.planner.roofline import Prediction, Rates, predict, rates_of
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

Change = Literal["none", "repeat KV", "merge KV", "train anew"]
TRADEOFF = Tradeoff()
# Tokens of a row, and rows: more than any machine holds, and few enough to compute with.
_MOST = 1 << 30


@dataclass(frozen=True)
class Candidate:
    """The model with some number of heads.

    Attributes:
        heads: of each layer.
        change: what makes the model at hand that. Only repeating KV heads keeps its outputs;
            merging them needs uptraining, and then, as after training anew, the loss is not known.
        step: what a decode step costs.
        cost: Z of it.
        relative_cost: beside that of the model at hand.
        equal_cost_parameters: N at which it would cost as much as the model at hand; None where it
            costs more without any.
        paper: M, C and Z in the paper's units.
        fits: whether the target's memory holds weights and cache; None where its size is not known.
        prediction: by the roofline; None where it does not fit, or without figures of the target.
    """

    heads: Heads
    change: Change
    step: StepCost
    cost: float
    relative_cost: float
    equal_cost_parameters: int | None
    paper: PaperCost
    fits: bool | None
    prediction: Prediction | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        step = {**asdict(self.step), "memory_bytes": self.step.memory_bytes}
        return {
            **asdict(self),
            "heads": self.heads.query,
            "kv_heads": self.heads.kv,
            "step": {**step, "flops": self.step.flops},
        }


@dataclass(frozen=True)
class Plan:
    """What `plan_model` found.

    Attributes:
        model: its short name.
        shape: the architecture.
        lowering: how it is stored, and what is computed in.
        target: device and software.
        context: tokens of each row.
        own: the model at hand.
        candidates: it among others, the cheapest first.
        rates: of the target; None where it has no figures.
        published: what the paper's table says; None beyond its contexts.
        gains: what attention variants could buy.
        loss: by which the table was read, asked for or `reference`'s; None where none is known.
        reference: size in parameters of the published model whose loss that is; None where it was
            asked for, or no such model is near.
    """

    model: str
    shape: ModelShape
    lowering: Lowering
    target: Target
    context: int
    own: Candidate
    candidates: tuple[Candidate, ...]
    rates: Rates | None
    published: PublishedHeads | None
    gains: AttentionGains
    loss: float | None
    reference: float | None

    @property
    def beyond_checkpoint(self) -> bool:
        """Whether the context is longer than what the checkpoint was trained for."""
        return self.context > self.shape.max_context

    @property
    def published_candidate(self) -> Candidate | None:
        """What the table takes for the cheapest; None where it says nothing of such heads."""
        if self.published is None or self.shape.head_dim != HEAD_WIDTH:
            return None
        best = self.published.heads
        return next((found for found in self.candidates if found.heads == best), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        memory = self.target.device.memory
        return {
            "model": self.model,
            "target": self.target.name,
            "lowering": self.lowering.to_dict(),
            "context": self.context,
            "batch": self.lowering.batch,
            "max_context": self.shape.max_context,
            "head_dim": self.shape.head_dim,
            "memory_gb": None if memory is None else memory.total_gb,
            "rates": None if self.rates is None else asdict(self.rates),
            "tradeoff": asdict(TRADEOFF),
            "own": self.own.to_dict(),
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "published": None if self.published is None else self.published.to_dict(),
            "loss": self.loss,
            "reference_parameters": self.reference,
            "gains": self.gains.to_dict(),
            "predicted": "bounds by peak rate and bandwidth; nothing was measured",
        }


def plan_model(
    model: str | Path, recipe: Recipe, *, loss: float | None = None, offline: bool = False
) -> Plan:
    """Costs a model and others that differ in their heads; of a hub id only config.json is fetched.

    A context beyond the checkpoint's is costed as if it had been trained for it.

    Args:
        model: Hugging Face directory, GGUF file or, as a str, a hub id owner/name[@revision].
        recipe: target, scheme, dtype, batch, and context, whose default is the checkpoint's.
        loss: row of the published table; None takes that of a published model of about this size.
        offline: look a hub id up in the cache alone.

    Raises:
        EdgeattnError: the model is not there, or the target cannot run the recipe.
    """
    from edgeattn.models.hub import model_name, read_outline

    _check_counts(recipe)
    if loss is not None and not math.isfinite(loss):
        raise UsageError(
            expected="a loss that is a number", came=f"it is {loss}", todo="give for example 2.6"
        )
    target = parse_target(recipe.target)
    lowering = plan_lowering(replace(recipe, context=None), target)
    known = read_outline(model, offline=offline).shape
    context = recipe.context or known.max_context
    shape = replace(known, max_context=max(context, known.max_context))
    lowering = fit_lowering(lowering, shape, target)
    candidates = sorted(_candidates(shape, lowering, target, context), key=lambda c: c.cost)
    reference = reference_size(shape.num_parameters) if loss is None else None
    loss = loss if reference is None else REFERENCE_LOSSES[reference]
    return Plan(
        model=model_name(model),
        shape=known,
        lowering=lowering,
        target=target,
        context=context,
        own=next(found for found in candidates if found.change == "none"),
        candidates=tuple(candidates),
        rates=rates_of(target, lowering),
        published=published_heads(context, loss),
        gains=attention_gains(shape, lowering, target, context, recipe.batch),
        loss=loss,
        reference=reference,
    )


def _check_counts(recipe: Recipe) -> None:
    for name in ("context", "batch"):
        value = getattr(recipe, name)
        if value is not None and value > _MOST:
            raise UsageError(
                expected=f"a {name} of at most {_MOST:,}",
                came="more was asked for",
                todo="ask for less",
            )


def _candidates(
    shape: ModelShape, lowering: Lowering, target: Target, context: int
) -> Iterator[Candidate]:
    """All whose widths the scheme takes."""
    batch, rates, memory = lowering.batch, rates_of(target, lowering), target.device.memory
    own_cost = step_cost(shape, lowering, context, batch).cost(TRADEOFF)
    for heads in candidate_heads(shape):
        other = with_heads(shape, heads)
        try:
            fitted = fit_lowering(lowering, other, target)
        except LoweringError:  # a group of weights is wider than the heads together
            continue
        step = step_cost(other, fitted, context, batch)
        fits = None if memory is None else step.memory_bytes <= 1e9 * memory.total_gb
        yield Candidate(
            heads=heads,
            change=_change(shape, heads),
            step=step,
            cost=step.cost(TRADEOFF),
            relative_cost=step.cost(TRADEOFF) / own_cost,
            equal_cost_parameters=step.parameters_at(own_cost, TRADEOFF),
            paper=paper_cost(other, context, TRADEOFF),
            fits=fits,
            prediction=predict(other, fitted, context, batch, rates) if rates and fits else None,
        )


def _change(shape: ModelShape, heads: Heads) -> Change:
    """What makes a model one with these heads."""
    if heads == (shape.num_heads, shape.num_kv_heads):
        return "none"
    if heads.query == shape.num_heads and heads.kv % shape.num_kv_heads == 0:
        return "repeat KV"
    if heads.query == shape.num_heads and shape.num_kv_heads % heads.kv == 0:
        return "merge KV"
    return "train anew"
