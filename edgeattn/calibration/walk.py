"""One layer over all calibration windows, with a stop before each group of linear layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from edgeattn.models.decoder import DecoderLayer
from edgeattn.models.layer_inputs import LayerInputs
from edgeattn.models.stream import batches, run_layer
from edgeattn.shape import ModelShape

Stages = tuple[tuple[str, ...], ...]
# Linear layers that read the same input, in the order they run.
STAGES: Stages = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class LayerWalk:
    """Runs a layer stage by stage, so that a stage can be changed before the next one reads it.

    To be used in torch's inference mode.

    Every input is what the layer's present weights give: quantised stages are felt by the later
    ones, as in the finished model (GPTQ's "true sequential" order).

    Args:
        layer: whose weights the caller may change between stages; not fused.
        hidden: the residual stream before it, `[N, L, hidden]`; becomes the one behind it.
        shared: of windows of L tokens.
        shape: of the model.
    """

    def __init__(
        self, layer: DecoderLayer, hidden: Tensor, shared: LayerInputs, shape: ModelShape
    ) -> None:
        self._layer, self._hidden, self._shared, self._shape = layer, hidden, shared, shape
        # The inputs of o_proj and of down_proj: attention is not computed twice.
        self._mixed: Tensor | None = None
        self._gated: Tensor | None = None

    def inputs(self, stage: int) -> Iterator[Tensor]:
        """The input of the linear layers of `STAGES[stage]`, `[n, L, K]` for a few windows each.

        Stages are asked for in their order and each to its end.
        """
        return (self._attention_inputs, self._mixed_inputs, self._mlp_inputs, self._gated_inputs)[
            stage
        ]()

    def _attention_inputs(self) -> Iterator[Tensor]:
        for rows in batches(self._hidden):
            yield self._layer.input_layernorm(rows)

    def _mixed_inputs(self) -> Iterator[Tensor]:
        size = (*self._hidden.shape[:2], self._shape.q_size)
        self._mixed = self._hidden.new_empty(size)
        for rows, mixed in zip(batches(self._hidden), batches(self._mixed), strict=True):
            attention, normed = self._layer.self_attn, self._layer.input_layernorm(rows)
            past = attention.no_past(len(rows), rows.dtype)
            mixed.copy_(attention.mix(normed, self._shared, past)[0])
            yield mixed

    def heads(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values behind their rotary positions, once stage 0 has been asked for.

        Each `[n, heads, L, D]` for a few windows.
        """
        for rows in batches(self._hidden):
            normed = self._layer.input_layernorm(rows)
            yield self._layer.self_attn.heads_of(normed, self._shared.rotary)

    def _mlp_inputs(self) -> Iterator[Tensor]:
        assert self._mixed is not None
        for rows, mixed in zip(batches(self._hidden), batches(self._mixed), strict=True):
            rows += self._layer.attention_output_norm(self._layer.self_attn.o_proj(mixed))
            yield self._layer.post_attention_layernorm(rows)
        self._mixed = None

    def _gated_inputs(self) -> Iterator[Tensor]:
        size = (*self._hidden.shape[:2], self._shape.intermediate_size)
        self._gated = self._hidden.new_empty(size)
        for rows, gated in zip(batches(self._hidden), batches(self._gated), strict=True):
            gated.copy_(self._layer.mlp.gated(self._layer.post_attention_layernorm(rows)))
            yield gated

    def run(self) -> None:
        """Passes through the whole layer at once, instead of stage by stage."""
        run_layer(self._layer, self._hidden, self._shared)

    def finish(self) -> None:
        """Adds what the MLP gives; the residual stream is then the one behind the layer."""
        assert self._gated is not None
        for rows, gated in zip(batches(self._hidden), batches(self._gated), strict=True):
            rows += self._layer.mlp_output_norm(self._layer.mlp.down_proj(gated))
        self._gated = None
