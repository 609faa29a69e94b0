"""Whether a model fits a device's memory, and what would: arithmetic on its shape.

What runs holds the weights, the cache, the tensors of one step and the runtime itself. Weights are
those of the file: engines of TensorRT-RTX 1.7 with one profile (4 and 16 layers; fp16, w8-rtn,
w4-rtn) were at most `ENGINE_BYTES` and `ENGINE_LAYER_BYTES` per layer larger, and measured 3.3 to
14.2 MB larger, so that nothing quantised is widened in them. Tensors of a
step are counted as the graph's largest set of live ones, which a test finds anew node by node in
exported graphs; TensorRT fuses some of them. What building takes was measured on models of up to
333 million weights, and is an extrapolation beyond. What was not measured is named an assumption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgeattn.devices.registry import Target, all_devices, parse_target
from edgeattn.devices.schema import Memory
from edgeattn.encoder_shape import AnyShape, EncoderShape, is_image
from edgeattn.errors import EdgeattnError
from edgeattn.planner.encoder_estimate import (
    build_bytes,
    encoder_activation_bytes,
    encoder_output_bytes,
    encoder_weight_bytes,
)
from edgeattn.planner.encoder_lowering import fit_any_lowering
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.planner.memory import DTYPE_BYTES, cache_bytes_per_token, weight_bytes
from edgeattn.quant.scheme import SCHEMES
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

# Tokens of a prompt that one step takes at most, as `engine.profiles` builds it.
PREFILL_TOKENS = 512
# What an engine holds besides weights.
ENGINE_BYTES, ENGINE_LAYER_BYTES = 2_000_000, 800_000
# Assumptions: what Linux takes of memory it shares with a GPU, without a desktop; and a process
# with CUDA's context, TensorRT and its kernels.
SYSTEM_BYTES = 1_500_000_000
RUNTIME_BYTES = 500_000_000

_SHORTEST_CONTEXT = 512
_GATE_TENSORS = 4  # of the MLP, when gate and up are multiplied


@dataclass(frozen=True)
class MemoryFit:
    """What a model takes of a device's memory; all in bytes but for the last three.

    Attributes:
        weights: as stored, with what an engine adds.
        cache: keys and values; twice where a step writes a longer one beside the old one.
        activations: of the largest step.
        logits: that such a step gives; an encoder's outputs.
        runtime: see `RUNTIME_BYTES`.
        system: what is not the model's to use.
        build: of TensorRT's builder, in the CPU's memory; 0 without an engine.
        device: what there is.
        shared: the CPU's memory is the GPU's.
        context: longest sequence in tokens.
        batch: rows.
    """

    weights: int
    cache: int
    activations: int
    logits: int
    runtime: int
    system: int
    build: int
    device: int
    shared: bool
    context: int
    batch: int

    @property
    def needed(self) -> int:
        """Bytes while it runs, the system's among them."""
        parts = (self.weights, self.cache, self.activations, self.logits, self.runtime)
        return sum(parts) + self.system

    @property
    def loading(self) -> int:
        """Bytes while the engine is read, of which shared memory holds the file, too."""
        copies = 2 if self.shared else 1
        return copies * self.weights + self.runtime + self.system

    @property
    def building(self) -> int:
        """Bytes while an engine is built; 0 where that takes none of the device's memory."""
        return self.build + self.system if self.build and self.shared else 0

    @property
    def runs(self) -> bool:
        """Whether there is memory to run it."""
        return self.needed <= self.device

    @property
    def fits(self) -> bool:
        """Whether there is memory to build it, where the device does that, and to run it."""
        return max(self.needed, self.building) <= self.device

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        sums = ("needed", "loading", "building", "runs", "fits")
        return {**asdict(self), **{name: getattr(self, name) for name in sums}}


@dataclass(frozen=True)
class Choice:
    """A way to make a model fit.

    Attributes:
        target: NAME@SOFTWARE.
        quant: scheme.
        context: in tokens; None for images.
        batch: rows.
        needed: bytes while it runs.
        device: bytes there are.
    """

    target: str
    quant: str
    context: int | None
    batch: int
    needed: int
    device: int


def memory_fit(
    shape: AnyShape,
    lowering: Lowering,
    memory: Memory | None,
    *,
    available: int | None = None,
    stored: int | None = None,
) -> MemoryFit:
    """What a model takes of a device's memory.

    Args:
        shape: the architecture.
        lowering: from `fit_lowering`.
        memory: the device's; None for a CPU, of which `available` must be known.
        available: bytes there are, where that is known better than from the device's file.
        stored: bytes of the weights file, where there is one.
    """
    context, rows = lowering.context or shape.max_context, lowering.batch
    step = _encoder_step if isinstance(shape, EncoderShape) else _decoder_step
    cache, activations, output = step(shape, lowering, context)  # type: ignore[arg-type]
    on_gpu = lowering.flavour != "onnxruntime"
    shared = memory is None or memory.shared_with_cpu
    total = int(1e9 * memory.total_gb) if memory else 0
    weights = stored if stored is not None else _weight_bytes(shape, lowering)
    if on_gpu:
        weights += ENGINE_BYTES + ENGINE_LAYER_BYTES * shape.num_layers
    elif lowering.dtype == "fp16":
        weights *= 2  # ONNX Runtime computes it in fp32 on a CPU
    return MemoryFit(
        weights=weights,
        cache=rows * cache,
        activations=rows * activations,
        logits=rows * output,
        runtime=RUNTIME_BYTES if on_gpu else 0,
        system=SYSTEM_BYTES if shared and on_gpu else 0,
        build=build_bytes(shape, lowering) if on_gpu else 0,
        device=total if available is None else available,
        shared=shared,
        context=context,
        batch=rows,
    )


def _weight_bytes(shape: AnyShape, lowering: Lowering) -> int:
    if isinstance(shape, EncoderShape):
        return encoder_weight_bytes(shape, lowering)
    return weight_bytes(shape, lowering)


def _encoder_step(shape: EncoderShape, lowering: Lowering, context: int) -> tuple[int, int, int]:
    """Bytes of a row's cache, of a step's tensors and of its outputs."""
    tensors = context * encoder_activation_bytes(shape, lowering)
    return 0, tensors, encoder_output_bytes(shape, lowering)


def _decoder_step(shape: ModelShape, lowering: Lowering, context: int) -> tuple[int, int, int]:
    """Likewise; a long prompt comes in pieces."""
    tokens = min(PREFILL_TOKENS, context)
    cache = _cache_copies(lowering) * cache_bytes_per_token(shape, lowering) * context
    tensors = tokens * _activation_bytes_per_token(shape, lowering, context)
    logits = (tokens if lowering.logits == "all" else 1) * shape.vocab_size
    return cache, tensors, logits * DTYPE_BYTES[lowering.dtype]


def _cache_copies(lowering: Lowering) -> int:
    """Caches there are at once: a joined one is written anew at each step."""
    return 2 if lowering.kv_cache in ("concat", "packed") else 1


def _activation_bytes_per_token(shape: ModelShape, lowering: Lowering, context: int) -> int:
    """Bytes of the tensors that are alive together, at the step of a block that has most.

    Beside the residual stream, rotary tables and the mask these are the MLP's, or what attention
    reads, or the scores of attention that is spelled out, in fp32 before and after the mask.
    """
    wide = DTYPE_BYTES[lowering.dtype]
    rotated = sum(rope.dim for rope in shape.ropes)
    always = (shape.hidden_size + rotated) * wide + context
    mlp = _GATE_TENSORS * shape.intermediate_size * wide
    heads = 2 * (shape.q_size + 2 * shape.kv_size) * wide
    is_spelled_out = lowering.attention == "primitive" or lowering.variant is not None
    scores = 2 * 4 * shape.num_heads * context if is_spelled_out else 0
    return always + max(mlp, heads, scores)


def what_fits(
    shape: AnyShape, recipe: Recipe, target: Target, *, available: int | None = None
) -> list[Choice]:
    """Ways to run a model that does not fit as asked: schemes, shorter contexts, larger devices.

    Args:
        shape: the architecture.
        recipe: what was asked for.
        target: the device it does not fit.
        available: see `memory_fit`.

    Returns:
        For each scheme that fits here the longest context, halving it from the one asked for; or,
        where none does, the smallest device of the same kind that runs what was asked for, or else
        some scheme. Schemes of equal size are one, the first of `SCHEMES`.
    """
    here = [_longest(shape, quant, recipe, target, available) for quant in _schemes(recipe)]
    found = [choice for choice in here if choice is not None]
    if found:
        sizes = {(choice.context, choice.needed): choice for choice in reversed(found)}
        return [choice for choice in found if choice in sizes.values()]
    same = [d for d in all_devices() if d.kind == target.device.kind and d.memory is not None]
    for device in sorted(same, key=lambda d: d.memory.total_gb if d.memory else 0):
        other = parse_target(device.name)
        for quant in _schemes(recipe):
            choice = _choice(shape, replace(recipe, quant=quant), other, None)
            if choice is not None:
                return [choice]
    return []


def _schemes(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys([recipe.quant, *SCHEMES]))


def _longest(
    shape: AnyShape, quant: str, recipe: Recipe, target: Target, available: int | None
) -> Choice | None:
    """A scheme at the longest context that fits."""
    for batch in dict.fromkeys((recipe.batch, 1)):
        for context in _contexts(shape, recipe):
            asked = replace(recipe, quant=quant, context=context, batch=batch)
            choice = _choice(shape, asked, target, available)
            if choice is not None:
                return choice
    return None


def _contexts(shape: AnyShape, recipe: Recipe) -> Iterator[int | None]:
    """Contexts to try, the longest first; an image has as many tokens as it has."""
    if is_image(shape):
        yield recipe.context
        return
    longest = recipe.context or shape.max_context
    yield longest
    longest //= 2
    while longest >= _SHORTEST_CONTEXT:
        yield longest
        longest //= 2


def _choice(
    shape: AnyShape, recipe: Recipe, target: Target, available: int | None
) -> Choice | None:
    """What a recipe takes, None where it is refused or does not fit."""
    try:
        lowering = fit_any_lowering(plan_lowering(recipe, target), shape, target)
    except EdgeattnError:
        return None
    fit = memory_fit(shape, lowering, target.device.memory, available=available)
    if not fit.fits:
        return None
    context = None if is_image(shape) else fit.context
    return Choice(target.name, recipe.quant, context, fit.batch, fit.needed, fit.device)
