"""Merges orthogonal rotations into the weights: SpinQuant's R1 and R2, and the inverse of R4.

A network of RMSNorms and linear layers computes the same function in any orthonormal basis of its
residual stream (R1) and of each value head (R2), once the norms' gains are folded into the linear
layers behind them. In a good basis no channel is much larger than the others, so that weights and
activations round well. Source: SpinQuant (arXiv 2405.16406), QuaRot (arXiv 2404.00456); embedding
rows keep their means, whose removal is for LayerNorm and would change an RMSNorm model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from edgeattn.errors import ProofError
from edgeattn.models.families import EMBEDDING, FINAL_NORM, LM_HEAD
from edgeattn.models.model import Model, ModelWeights
from edgeattn.models.stream import Head, final_hidden
from edgeattn.quant.activation import LinearInput
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.hadamard import (
    HadamardFactors,
    hadamard_factors,
    rotation_matrix,
    transform,
)
from edgeattn.quant.scheme import WeightFormat
from edgeattn.quant.stiefel import orthogonality_error
from edgeattn.shape import ModelShape

# Rows of a matrix multiplied in fp64 at once: an embedding of 128 thousand rows would take 4 GB.
_ROWS = 8192
# Of the logits' root mean square; measured on SmolLM2 in fp32: 2e-5.
EQUIVALENCE_BOUND = 1e-3
_GAINS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
_TO_RESIDUAL = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True, eq=False)
class Rotations:
    """Rotations of one model, orthogonal to rounding in fp64.

    Attributes:
        residual: R1 `[d, d]`, or None.
        heads: R2 `[Dh, Dh]` of each layer, shared by its heads; or none at all.
        down: R4, the online rotation before every down projection, or None.
    """

    residual: Tensor | None = None
    heads: tuple[Tensor, ...] = ()
    down: HadamardFactors | None = None

    def orthogonality_error(self) -> float:
        """Largest |R Rᵀ - I| of all matrices."""
        matrices = [*self.heads, *([] if self.residual is None else [self.residual])]
        errors = [orthogonality_error(matrix) for matrix in matrices]
        return float(torch.tensor(errors).max()) if errors else 0.0  # keeps a NaN, as max() may not


def hadamard_rotations(shape: ModelShape, *, online: bool, seed: int = 0) -> Rotations:
    """Randomised Hadamard matrices for R1 and R2, and R4 where `online`.

    Raises:
        EdgeattnError: a width has no Hadamard matrix, not even in blocks.
    """
    heads = tuple(
        rotation_matrix(shape.head_dim, seed=seed + 1 + layer) for layer in range(shape.num_layers)
    )
    return Rotations(
        residual=rotation_matrix(shape.hidden_size, seed=seed),
        heads=heads,
        down=hadamard_factors(shape.intermediate_size) if online else None,
    )


def fold_norms(model: Model) -> Model:
    """Moves the gains of all norms on the residual stream into the linear layers behind them.

    The LM head gets a matrix of its own, as the embedding has no norm before it.
    """
    return rotate(model, Rotations())


def rotate(
    model: Model, rotations: Rotations, *, without_online: frozenset[str] = frozenset()
) -> Model:
    """The model in the rotated basis, its norms folded; the same function.

    Everything is multiplied in fp64 when a weight is read, and cast once to fp32.

    Args:
        model: not quantised and not fused.
        rotations: which; `down` adds an online rotation that `Model.reads` tells of.
        without_online: weights of down projections that read their input unrotated.

    Norms behind attention and MLP (Gemma 2) do not commute with R1; the planner refuses them.
    """
    shape = model.shape
    assert not shape.output_norms, "R1 does not commute with norms of what is added"
    reads = {}
    if rotations.down is not None:
        read = LinearInput(rotation=rotations.down)
        names = (f"layers.{i}.mlp.down_proj.weight" for i in range(shape.num_layers))
        reads = {name: read for name in names if name not in without_online}
    return Model(
        replace(shape, tied_embeddings=False),
        _RotatedWeights(model.weights, shape, rotations, frozenset(reads)),
        {**model.reads, **reads},
        basis=rotations.residual,
    )


@dataclass(frozen=True)
class Equivalence:
    """How far a rotated model is from the original one, in fp32, before anything is rounded.

    Attributes:
        logit_difference: largest of any logit.
        logit_rms: root mean square of the original logits.
        orthogonality_error: largest |R Rᵀ - I| of the rotations.
        tokens: that were compared.
    """

    logit_difference: float
    logit_rms: float
    orthogonality_error: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def check_equivalence(
    model: Model, rotated: Model, rotations: Rotations, windows: Tensor
) -> Equivalence:
    """Runs both models on token ids `[N, L]`.

    Raises:
        ProofError: the logits differ by more than fp32 explains, or a rotation is not orthogonal.
    """
    expected, found = (Head(m).logits(final_hidden(m, windows)) for m in (model, rotated))
    result = Equivalence(
        logit_difference=float((found - expected).abs().max()),
        logit_rms=float(expected.square().mean().sqrt()),
        orthogonality_error=rotations.orthogonality_error(),
        tokens=windows.numel(),
    )
    bound = EQUIVALENCE_BOUND * result.logit_rms
    if not result.logit_difference <= bound or not result.orthogonality_error <= 1e-6:
        raise ProofError(
            expected=f"the rotated model's logits within {bound:.2g} of the original's",
            came=f"they differ by {result.logit_difference:.3g}, "
            f"with an orthogonality error of {result.orthogonality_error:.2g}",
            todo="report this with the checkpoint's name; a scheme without rotation works",
            details=result.to_dict(),
        )
    return result


@dataclass(frozen=True)
class _RotatedWeights:
    source: ModelWeights
    shape: ModelShape
    rotations: Rotations
    online: frozenset[str]  # weights behind an online rotation
    _gains: dict[str, Tensor] = field(default_factory=dict)

    def format(self, name: str) -> WeightFormat | None:
        return None

    def read(self, name: str) -> Tensor | QuantizedTensor:
        if name == FINAL_NORM or name.endswith(("input_layernorm.weight", "tion_layernorm.weight")):
            return torch.ones_like(self._stored(name), dtype=torch.float32)
        if name in (EMBEDDING, LM_HEAD):
            return self._table(name)
        layer, linear, kind = parts_of(name)
        if kind == "bias":
            return self._bias(name, layer, linear)
        return self._linear(name, layer, linear) if linear else self._stored(name)

    def _table(self, name: str) -> Tensor:
        tied = name == LM_HEAD and self.shape.tied_embeddings
        table = self._stored(EMBEDDING if tied else name)
        gain = self._gain(FINAL_NORM) if name == LM_HEAD else None
        return _by_rows(table, lambda rows: self._into_residual(_scaled(rows, gain)))

    def _linear(self, name: str, layer: int, linear: str) -> Tensor:
        weight = self._stored(name).double()
        if linear in _GAINS:
            weight = weight * self._gain(f"layers.{layer}.{_GAINS[linear]}.weight")
            weight = self._into_residual(weight)
        if linear == "self_attn.v_proj":
            weight = self._heads_of_rows(weight, layer)
        if linear == "self_attn.o_proj" and self.rotations.heads:
            weight = rotate_outputs(weight, self.rotations.heads[layer])
        if name in self.online and self.rotations.down is not None:
            weight = transform(weight, self.rotations.down)
        if linear in _TO_RESIDUAL and self.rotations.residual is not None:
            weight = self.rotations.residual.T @ weight
        return weight.float()

    def _bias(self, name: str, layer: int, linear: str) -> Tensor:
        bias = self._stored(name).double()
        if linear == "self_attn.v_proj":
            bias = self._heads_of_rows(bias.unsqueeze(1), layer).squeeze(1)
        return bias.float()

    def _heads_of_rows(self, weight: Tensor, layer: int) -> Tensor:
        heads = self.rotations.heads
        return rotate_values(weight, heads[layer]) if heads else weight

    def _into_residual(self, weight: Tensor) -> Tensor:
        residual = self.rotations.residual
        return weight if residual is None else weight @ residual

    def _gain(self, name: str) -> Tensor:
        if name not in self._gains:
            self._gains[name] = self._stored(name).double()
        return self._gains[name]

    def _stored(self, name: str) -> Tensor:
        value = self.source.read(name)
        assert isinstance(value, Tensor), f"{name} is quantised before it is rotated"
        return value


def rotate_values(weight: Tensor, matrix: Tensor) -> Tensor:
    """R2ᵀ on the rows of every KV head.

    Args:
        weight: of v_proj, `[H_kv D, K]`; its bias is one column of it.
        matrix: R2, `[D, D]`.
    """
    rotated: Tensor = matrix.T @ torch.unflatten(weight, 0, (-1, len(matrix)))
    return rotated.flatten(0, 1)


def rotate_outputs(weight: Tensor, matrix: Tensor) -> Tensor:
    """R2 on the columns of every query head.

    Args:
        weight: of o_proj, `[N, H D]`.
        matrix: R2, `[D, D]`.
    """
    rotated: Tensor = torch.unflatten(weight, 1, (-1, len(matrix))) @ matrix
    return rotated.flatten(1)


def parts_of(name: str) -> tuple[int, str, str]:
    """Layer, linear layer ("" for a norm within it) and "weight" or "bias" of a parameter."""
    _, layer, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return int(layer), part if part.endswith("_proj") else "", kind


def _scaled(rows: Tensor, gain: Tensor | None) -> Tensor:
    return rows if gain is None else rows * gain


def _by_rows(table: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` on fp64 rows, a few at a time, as fp32."""
    result = torch.empty(table.shape, dtype=torch.float32)
    for begin in range(0, len(table), _ROWS):
        result[begin : begin + _ROWS] = change(table[begin : begin + _ROWS].double())
    return result
