"""`plan_lowering`: which graph a recipe becomes on a target, or why it cannot. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from edgeattn.attention import (
    FftRopeRequest,
    GroupQueryRequest,
    HeadSparseRequest,
    LayerRequest,
    parse_attention,
)
from edgeattn.devices.registry import Target
from edgeattn.devices.schema import GraphRules
from edgeattn.encoder_shape import AnyShape
from edgeattn.errors import BundleError, LoweringError, UsageError
from edgeattn.planner.recurrent import check_attention_kind, fit_recurrent
from edgeattn.quant.scheme import Scheme, parse_scheme
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape


@dataclass(frozen=True)
class Lowering:
    """Every choice about the graph that does not depend on the model.

    Attributes:
        target: canonical NAME@SOFTWARE.
        flavour: the engine that will run it.
        dtype: activations, unquantised weights, cache and logits.
        scheme: quantisation.
        opset: of the ONNX standard domain.
        attention: "standard" (Attention-23), "primitive" operators, or "group-query" (ONNX
            Runtime's GroupQueryAttention).
        embedding: how a quantised table is read: "dequantize-gather" (TensorRT takes a quantised
            constant only right before DequantizeLinear, and folds the pair) or
            "gather-dequantize" (ONNX Runtime would dequantise the whole table at each step).
        kv_cache: "concat" joins past and new keys outside the attention, slot by slot;
            "packed" joins each row's keys behind its last one, for the operators of attention
            variants; "shared-buffer" packs them too and writes in place where past and present are
            one buffer. These two take padding on the right of new tokens only. "static" writes new
            keys into a buffer of `context` slots, in place likewise.
        logits: "all" or "last".
        batch: most rows at once.
        context: longest sequence asked for; None is the checkpoint's own. `fit_lowering` makes it a
            number where the cache is static.
        strip_functions: function bodies are removed before an engine is built.
        rtx_sm: compute capability the TensorRT-RTX check builds for; None without TensorRT.
        variant: the attention variant asked for, NAME[:key=value,…].
    """

    target: str
    flavour: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    dtype: Literal["fp32", "fp16", "bf16"]
    scheme: Scheme
    opset: int
    attention: Literal["standard", "primitive", "group-query"]
    embedding: Literal["dequantize-gather", "gather-dequantize"]
    kv_cache: Literal["concat", "packed", "shared-buffer", "static"]
    logits: Literal["all", "last"]
    batch: int
    context: int | None
    strip_functions: bool
    rtx_sm: int | None
    variant: str | None = None

    @property
    def request(self) -> LayerRequest | None:
        """The attention variant that was asked for."""
        if self.variant is None:
            return None
        found = parse_attention(self.variant)
        assert not isinstance(found, GroupQueryRequest), "gqa is no variant of a layer"
        return found

    @property
    def packs_cache(self) -> bool:
        """Whether a row's keys lie at the front of the cache, without gaps."""
        return self.kv_cache in ("packed", "shared-buffer")

    @property
    def is_sparse_in_decoding(self) -> bool:
        """Whether a step of one token leaves out heads that a step of several has."""
        return isinstance(self.request, HeadSparseRequest)

    @property
    def decides_at_run_time(self) -> bool:
        """Whether a last bit can change much: what is rounded to int8, which heads are active."""
        return self.scheme.rounds_at_run_time or self.is_sparse_in_decoding

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, for the manifest and `--dry-run`."""
        return {**asdict(self), "scheme": self.scheme.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Lowering:
        """The inverse of `to_dict`: a bundle is judged by what was decided when it was made.

        Raises:
            BundleError: fields are missing or unknown.
        """
        try:
            return cls(**{**values, "scheme": parse_scheme(values["scheme"]["label"])})
        except (TypeError, KeyError, UsageError) as error:
            raise BundleError(
                expected="the lowering in the bundle's manifest",
                came=f"it does not fit this edgeattn ({error})",
                todo="export the bundle again",
            ) from error


def plan_lowering(recipe: Recipe, target: Target) -> Lowering:
    """Decides the graph for `recipe` on `target`.

    Raises:
        LoweringError: the target cannot run it; the sentence gives the reason.
    """
    dtype = recipe.dtype or target.preferred_dtype
    if dtype not in target.dtypes:
        raise _refused(target, f"a dtype among {', '.join(target.dtypes)}", f"--dtype is {dtype}")
    scheme = recipe.scheme
    _check_weights(scheme, target)
    graph = target.software.graph
    request = recipe.attention_request
    if request is not None and scheme.kv_bits is not None:
        raise LoweringError(
            expected="a floating-point cache for an attention variant",
            came=f"scheme {scheme.label} holds it in int8",
            todo="leave out kv=int8 or --attention",
        )
    is_static = recipe.kv_cache == "static"
    opset = target.opset(int4=4 in scheme.weight_bits)
    if is_static:
        opset = max(opset, _static_opset(target, request, scheme))
    # GroupQueryAttention writes its cache in place, in the dtype it computes in, and is all of it.
    is_own = graph.kv_cache == "shared-buffer"
    joined = is_own and (is_static or scheme.kv_bits is not None or request is not None)
    kv_cache = "static" if is_static else "concat" if joined else graph.kv_cache
    return Lowering(
        target=target.name,
        flavour=target.flavour,
        dtype=dtype,
        scheme=scheme,
        opset=opset,
        attention="standard" if joined else graph.operators,
        embedding=_embedding_form(target),
        kv_cache="packed" if request is not None else kv_cache,
        logits=recipe.logits,  # type: ignore[arg-type]
        batch=recipe.batch,
        context=recipe.context,
        strip_functions=graph.strip_functions,
        rtx_sm=target.device.gpu.nearest_rtx_sm if target.device.gpu else None,
        variant=None if request is None else request.label,
    )


def _static_opset(target: Target, request: LayerRequest | None, scheme: Scheme) -> int:
    """The opset of a static cache, or why there is none."""
    if request is not None:
        raise LoweringError(
            expected="a growing cache for an attention variant",
            came=f"--kv-cache is static and {request.label} packs each row's keys at the front",
            todo="leave out --kv-cache or --attention",
        )
    graph, stack = target.software.graph, target.software.stack
    if graph.opset_static_cache is None:
        raise LoweringError(
            expected="software that reads ONNX's TensorScatter, for a static cache",
            came=f"{target.name} has {stack.engine} {stack.version}",
            todo="leave out --kv-cache, or choose newer software where the device has it",
        )
    if scheme.kv_bits is not None and not graph.int8_static_cache:
        raise LoweringError(
            expected=f"a floating-point cache on {target.name} where it is static",
            came=f"scheme {scheme.label} holds it in int8, which {stack.engine} does not scatter",
            todo="leave out kv=int8 or --kv-cache",
        )
    return graph.opset_static_cache


def _embedding_form(target: Target) -> Literal["dequantize-gather", "gather-dequantize"]:
    return "gather-dequantize" if target.flavour == "onnxruntime" else "dequantize-gather"


def _check_weights(scheme: Scheme, target: Target) -> None:
    missing = scheme.weight_bits - set(target.weight_bits)
    if missing:
        sm = f" (SM{target.device.gpu.sm})" if target.device.gpu else ""
        raise _refused(
            target,
            f"weights of {' or '.join(f'{b} bits' for b in target.weight_bits)}",
            f"scheme {scheme.label} stores int{min(missing)} weights, "
            f"which {target.device.name}{sm} has no kernels for",
        )
    group = scheme.linear.group_size if scheme.linear else None
    if group is not None and group not in target.int4_group_sizes:
        allowed = " or ".join(map(str, target.int4_group_sizes))
        raise _refused(target, f"a group of {allowed}", f"scheme {scheme.label} uses {group}")


def fit_lowering(lowering: Lowering, shape: ModelShape, target: Target) -> Lowering:
    """The lowering for one model: refused, or with what depends on the model's shape settled.

    Raises:
        LoweringError: a group does not divide a width, or the context exceeds the checkpoint's.
    """
    _check_scheme(lowering.scheme, shape)
    if shape.is_recurrent:
        lowering = fit_recurrent(lowering, shape)
    if lowering.request is not None:
        check_request(lowering.request, shape)
    if lowering.context is not None and lowering.context > shape.max_context:
        raise LoweringError(
            expected=f"a context of at most {shape.max_context} tokens, which the checkpoint knows",
            came=f"--context is {lowering.context}",
            todo="ask for less",
        )
    context = lowering.context or shape.max_context
    if isinstance(lowering.request, FftRopeRequest) and lowering.request.heads is None:
        _check_far_keys(lowering.request, context)
    within = shape.within(context)
    if lowering.kv_cache == "static":  # the capacity
        lowering = replace(lowering, context=context)
    return _fit_attention(lowering, within, target.software.graph)


def check_request(request: LayerRequest, shape: ModelShape) -> None:
    """Refuses an attention variant that a model cannot have.

    Raises:
        LoweringError: its scores have a cap, no head would be active, or the layers are or are not
            linear attention already.
    """
    check_attention_kind(request, shape)
    if shape.attention_softcap is not None:
        raise LoweringError(
            expected=f"a model without a cap on its attention's scores, for {request.label}",
            came=f"family {shape.family} has one, which the operator does not know",
            todo="leave out --attention",
        )
    if not isinstance(request, HeadSparseRequest):
        return
    units = shape.num_heads if request.unit == "heads" else shape.num_kv_heads
    if int(request.density * units) < 1:
        raise LoweringError(
            expected=f"a density of at least 1/{units}: one of the model's {units} {request.unit}",
            came=f"{request.label} leaves none",
            todo="ask for a higher density",
        )


def _check_far_keys(request: FftRopeRequest, context: int) -> None:
    exact = request.sink + request.window
    if context <= exact:
        raise LoweringError(
            expected=f"a context beyond the {exact} keys that {request.label} leaves exact",
            came=f"it is {context}, so that no key would be far",
            todo="ask for a smaller window, or leave out --attention",
        )


def check_groups(scheme: Scheme, linears: Mapping[str, tuple[int, int]]) -> None:
    """Refuses a scheme whose groups do not divide a width.

    Args:
        scheme: the scheme.
        linears: (outputs, inputs) of the linear layers of a block, by name.

    Raises:
        LoweringError: naming the layer.
    """
    for name, (_, inputs) in linears.items():
        format = scheme.format_of(name)
        if format is not None and format.group_size and inputs % format.group_size:
            other = "down_proj=w8, " if name.endswith("down_proj") else ""
            raise LoweringError(
                expected=f"a group that divides the {inputs} inputs of {name}",
                came=f"scheme {scheme.label} uses groups of {format.group_size}",
                todo=f"choose {other}--quant w8-rtn or another group",
            )


def _check_scheme(scheme: Scheme, shape: ModelShape) -> None:
    kinds = shape.layer_kinds
    check_groups(scheme, {k: v for kind in kinds for k, v in shape.linears(kind).items()})
    if scheme.small_head and shape.tied_embeddings and scheme.rotation in ("none", "auto"):
        raise LoweringError(
            expected="an LM head that is a matrix of its own, for head=w4",
            came="it is the embedding",
            todo="choose a scheme that rotates, or leave out head=w4",
        )
    if scheme.rotation != "none" and shape.output_norms:
        raise LoweringError(
            expected="a model whose attention and MLP add to the residual stream unchanged",
            came=f"family {shape.family} normalises what they give: no rotation commutes with it",
            todo="choose a scheme without rotation, such as w4a16-gptq",
        )
    check_rotated(scheme, shape)


def check_rotated(scheme: Scheme, shape: AnyShape) -> None:
    """Refuses a scheme that rotates where no Hadamard matrix fits, not even in blocks.

    Raises:
        LoweringError: naming the width.
    """
    if scheme.rotation == "none":
        return
    online = {"intermediate size": shape.intermediate_size} if scheme.online else {}
    widths = {"hidden size": shape.hidden_size, "head_dim": shape.head_dim, **online}
    for what, width in widths.items():
        if width % 2:
            raise LoweringError(
                expected=f"an even {what}, which scheme {scheme.label} rotates",
                came=f"it is {width}",
                todo="choose a scheme without rotation, such as w4a16-gptq",
            )


def _fit_attention(lowering: Lowering, shape: ModelShape, graph: GraphRules) -> Lowering:
    """The spelling of attention that the target has right kernels for."""
    if lowering.attention == "group-query":
        widths = (shape.head_dim, *(rope.dim for rope in shape.ropes))
        if shape.has_windows or any(width % graph.head_dim_multiple for width in widths):
            return replace(lowering, attention="standard", kv_cache="concat")
        return lowering
    return fit_head_dim(lowering, shape.head_dim, graph)


def fit_head_dim(lowering: Lowering, head_dim: int, graph: GraphRules) -> Lowering:
    """The spelling of attention whose kernels take heads of this width."""
    low, high = graph.min_head_dim or 1, graph.max_head_dim or head_dim
    # Outside the widths TensorRT has kernels for, its builder takes the primitive spelling only.
    return lowering if low <= head_dim <= high else replace(lowering, attention="primitive")


def _refused(target: Target, expected: str, came: str) -> LoweringError:
    return LoweringError(
        expected=f"{expected} on {target.name}",
        came=came,
        todo="choose another scheme, dtype or target (edgeattn targets lists them)",
    )
