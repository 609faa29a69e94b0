"""`edgeattn plan`: what a model costs on a target, and which heads would cost less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeattn.cli.names import DTYPE, PATH, SCHEME, TARGET
from edgeattn.cli.verb import Verb

if TYPE_CHECKING:
    from rich.table import Table

    from edgeattn.pipeline.plan import Candidate, Plan
    from edgeattn.planner.cost import Heads
    from edgeattn.planner.roofline import Rates

_EXAMPLES = """
  edgeattn plan ./SmolLM2-135M --target jetson-orin --quant w4-rtn --context 8192
  edgeattn plan Qwen/Qwen3-1.7B --target l4 --context 32768 --batch 8 --plot cost.svg
  edgeattn plan ./model --target h100 --context 131072 --loss 2.6 --json
"""
_LEAST_WIDTH = 76


@click.command(
    "plan",
    cls=Verb,
    examples=_EXAMPLES,
    reads="config.json of MODEL, or a GGUF file's header",
    writes="nothing, or the plot of --plot",
)
@click.argument("model", type=PATH)
@click.option(
    "--target", type=TARGET, required=True, metavar="NAME[@SOFTWARE]", help="See edgeattn targets."
)
@click.option(
    "--context", type=int, metavar="TOKENS", show_default="the model's", help="Of each row."
)
@click.option("--batch", type=int, metavar="ROWS", default=1, help="Rows at once.")
@click.option(
    "--quant", type=SCHEME, default="none", metavar="NAME[:k=v,…]", help="Scheme; see README."
)
@click.option(
    "--dtype",
    type=DTYPE,
    metavar="fp32|fp16|bf16",
    show_default="what the target prefers",
    help="Of activations.",
)
@click.option(
    "--loss",
    type=float,
    show_default="that of a model of this size",
    help="Row of the published table, in nats per token.",
)
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw cost against context, as .png or .svg.",
)
@click.option("--offline", is_flag=True, help="Take a hub id from the cache alone.")
@click.option("--force", is_flag=True, help="Replace a plot that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    model: str,
    target: str,
    context: int | None,
    batch: int,
    quant: str,
    dtype: str | None,
    loss: float | None,
    plot: Path | None,
    offline: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Say what decoding with MODEL costs on a target, and which heads would cost less.

    Arithmetic alone, which needs no torch and no weights: bytes and FLOPs, one cost of both
    (arXiv 2503.09579), and by peak rate and bandwidth what the target can reach at most. MODEL is
    what `edgeattn export` takes.
    """
    from edgeattn.pipeline.cost_plot import require_plot, write_plot
    from edgeattn.pipeline.plan import plan_model
    from edgeattn.recipe import Recipe

    if plot is not None:
        require_plot(plot, force=force)
    recipe = Recipe(target, quant=quant, dtype=dtype, context=context, batch=batch)
    found = plan_model(model, recipe, loss=loss, offline=offline)
    if plot is not None:
        write_plot(found, plot)
    if as_json:
        content = found.to_dict() | {"plot": None if plot is None else str(plot)}
        click.echo(json.dumps(content, indent=2))
        return
    _show(found)
    if plot is not None:
        click.echo(f"plot: {plot}")


def _show(plan: Plan) -> None:
    from rich.console import Console

    rows = f"{plan.lowering.batch} rows" if plan.lowering.batch > 1 else "1 row"
    click.echo(
        f"{plan.model} on {plan.target.name}: {plan.lowering.scheme.label}, "
        f"{plan.lowering.dtype}, {rows} of {plan.context:,} tokens; predicted, nothing measured"
    )
    if plan.beyond_checkpoint:
        click.echo(
            f"the checkpoint was trained for {plan.shape.max_context:,} tokens: this is what it "
            "would cost, not what it can do"
        )
    for title, text in _summary(plan).items():
        click.echo(f"{title:10} {text}")
    # a narrower terminal breaks lines, where rich would cut figures short
    Console(width=max(Console().width, _LEAST_WIDTH)).print(_table(plan))
    for line in (*_published(plan), *_gains(plan)):
        click.echo(line)


def _summary(plan: Plan) -> dict[str, str]:
    """What is said of the model at hand, by its title."""
    from edgeattn.cli.tables import size_text

    step, memory = plan.own.step, plan.target.device.memory
    flops = step.flops / plan.lowering.batch / 1e9
    share = step.attention_flops / step.flops
    lines = {
        "weights": size_text(step.weight_bytes),
        "cache": size_text(step.cache_bytes),
        "FLOPs": f"{flops:.2f} G per token decoded, {share:.0%} of them attention",
    }
    if memory is not None:
        shared = ", which the CPU shares" if memory.shared_with_cpu else ""
        verdict = "fit" if plan.own.fits else "DO NOT FIT"
        lines["memory"] = (
            f"weights and cache, {size_text(step.memory_bytes)}, {verdict} in "
            f"{memory.total_gb:g} GB{shared}"
        )
    if plan.rates is None:
        name = plan.target.device.name
        return {**lines, "speed": f"no figures of {name}: measure there, with edgeattn run"}
    return {**lines, "figures": _figures(plan.rates, plan.lowering.dtype), **_speed(plan.own)}


def _figures(rates: Rates, dtype: str) -> str:
    parts = [f"{rates.bytes_per_s / 1e9:g} GB/s", f"no published rate in {dtype}"]
    if rates.flops_per_s is not None:
        parts[1] = f"{rates.flops_per_s / 1e12:g} TFLOP/s in {dtype}"
    linear = rates.linear_flops_per_s
    if linear is not None and linear != rates.flops_per_s:
        parts.append(f"{linear / 1e12:g} TOP/s in int8")
    if rates.modes:
        parts.append(f"in power mode {' and '.join(rates.modes)}")
    return ", ".join(parts)


def _speed(own: Candidate) -> dict[str, str]:
    found = own.prediction
    if found is None:
        return {"speed": "not predicted for what does not fit"}
    most = f"predicted: at most {found.tokens_per_s:,.0f} tokens/s, bound by {found.bound}"
    if found.prompt_s is None:
        return {"decoding": most, "prompt": "not predicted"}
    return {"decoding": most, "prompt": f"predicted: at least {found.prompt_s:,.2f} s"}


def _table(plan: Plan) -> Table:
    from rich import box
    from rich.table import Table

    caption = (
        "heads/KV heads; FLOPs per token; cost 0.9 √memory + 0.1 ³√FLOPs beside this model's; "
        "same at: parameters with which such heads cost as much as this model, so that they are "
        "better if they reach its loss with fewer; tokens/s predicted, at most. Repeated KV heads "
        "keep the loss. Of all others it is not known; merged ones need uptraining."
    )
    best = plan.published_candidate
    if best is not None:
        caption += " * is the best by the published table, below."
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=caption,
        caption_justify="left",
    )
    for title in ("heads", "params", "memory", "FLOPs", "cost", "same at", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("how", no_wrap=True)
    for candidate in plan.candidates:
        style = "bold" if candidate is plan.own else None
        mark = " *" if candidate is best else ""
        table.add_row(*_row(candidate, plan.lowering.batch), _how(candidate) + mark, style=style)
    return table


def _row(candidate: Candidate, batch: int) -> list[str]:
    from edgeattn.cli.tables import size_text

    step, same = candidate.step, candidate.equal_cost_parameters
    speed = "?" if candidate.prediction is None else f"{candidate.prediction.tokens_per_s:,.0f}"
    return [
        _pair(candidate.heads),
        _count(step.parameters),
        size_text(step.memory_bytes),
        f"{step.flops / batch / 1e9:.2f} G",
        f"{candidate.relative_cost:.2f}",
        "never" if same is None else _count(same),
        "too large" if candidate.fits is False else speed,
    ]


def _how(candidate: Candidate) -> str:
    return "this model" if candidate.change == "none" else candidate.change


def _pair(heads: Heads) -> str:
    return f"{heads.query}/{heads.kv}"


def _count(parameters: float) -> str:
    return f"{parameters / 1e6:,.0f} M" if parameters < 1e9 else f"{parameters / 1e9:,.2f} B"


def _published(plan: Plan) -> list[str]:
    """What the paper's table says, and of what."""
    from edgeattn.planner.published_heads import CONTEXTS, HEAD_WIDTH

    found = plan.published
    if found is None:
        least, most = f"{CONTEXTS[0]:,}", f"{CONTEXTS[-1]:,}"
        return [
            f"published table (arXiv 2503.09579): nothing, it holds for {least} to {most} tokens"
        ]
    own = "" if plan.shape.head_dim == HEAD_WIDTH else f" (this model's: {plan.shape.head_dim})"
    about = (
        f"published table, at {found.context:,} tokens, for heads {HEAD_WIDTH} wide{own}, 16 bits "
        "and 1 row:"
    )
    if found.heads is None:
        losses: dict[Heads, list[str]] = {}
        for loss, heads in found.column.items():
            losses.setdefault(heads, []).append(f"{loss:g}")
        pairs = (f"{_pair(heads)} at loss {', '.join(at)}" for heads, at in losses.items())
        why = "no loss is published for a model of this size (--loss names one)"
        if plan.loss is not None:
            why = f"loss {plan.loss:g} is beyond the table"
        return [f"{about} {'; '.join(pairs)}", f"which row is this model's is not known: {why}"]
    why = "--loss"
    if plan.reference is not None:
        why = f"that of a published model of {_count(plan.reference)} parameters"
    return [
        f"{about} {_pair(found.heads)} at loss {found.loss:g}, nearest to {plan.loss:g} ({why})"
    ]


def _gains(plan: Plan) -> list[str]:
    """What attention variants could buy, or why not."""
    from edgeattn.planner.head_sparsity import WORTH_IT

    lines = []
    for sparse in plan.gains.head_sparsity:
        verdict = "" if sparse.worth_it else ": not worth its loss"
        lines.append(
            f"head sparsity, {sparse.density:.1%} of the heads: decoding at most "
            f"{sparse.speedup:.2f} times as fast{verdict} (of what a step reads the cache is "
            f"{sparse.cache_share:.0%}; {WORTH_IT} times from {sparse.least_context:,} tokens on)"
        )
    for gain in plan.gains.polynomials:
        verdict = "" if gain.worth_it else ": not worth its loss"
        what = "FLOPs" if gain.speed_crossover is None else "time"
        start = gain.speed_crossover or gain.flops_crossover
        lines.append(
            f"polynomials of degree {gain.degree}: a prompt takes at least {1 / gain.prompt:.2f} "
            f"times the {what}{verdict} (below {start:,.0f} tokens exact attention is better)"
        )
    if plan.gains.polynomials:
        lines.append(
            "that is if every head took them; few of a trained model do (edgeattn calibrate says "
            "which), and decoding gains nothing"
        )
    if plan.gains.refused is not None:
        lines.append(f"attention variants: {plan.gains.refused}")
    return lines
