"""Rotates what the linear layers of an encoder read: at run time, and merged for the value heads.

A decoder's R1 is merged into the weights, because RMSNorm commutes with it. LayerNorm does so only
without its mean, and where it stands behind the sum (BERT), its gain and bias stand on the stream
itself: in another basis each skip would be a product with a `[d, d]` matrix. So here the residual
stream stays as it is, and q, k, v and the MLP read it through a Hadamard transform, as down_proj
does in R4. That is exact for every family. Each of the two costs K + M products per number of a
width of K M: in MiniLM (384 = 12 * 32) 88 in all, beside 4,608 of a block's linear layers. R2 is
merged as in `transforms.rotate`, and R4 is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edgeattn.encoder_shape import QKV, EncoderShape
from edgeattn.errors import ProofError
from edgeattn.models.encoder import EncoderOutput
from edgeattn.models.encoder_model import EncoderModel, load_encoder
from edgeattn.models.model import ModelWeights
from edgeattn.quant.activation import LinearInput
from edgeattn.quant.hadamard import HadamardFactors, hadamard_factors, rotation_matrix, transform
from edgeattn.quant.scheme import WeightFormat
from edgeattn.transforms.rotate import EQUIVALENCE_BOUND, parts_of, rotate_outputs, rotate_values

_READERS = (*QKV, "mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, eq=False)
class EncoderRotations:
    """Rotations of one encoder.

    Attributes:
        heads: R2 `[D, D]` of each layer, shared by its heads; or none at all.
        inputs: at run time before q, k, v and the MLP, in the place of R1; or None.
        down: R4, at run time before every down projection; or None.
    """

    heads: tuple[Tensor, ...] = ()
    inputs: HadamardFactors | None = None
    down: HadamardFactors | None = None

    def to_dict(self) -> dict[str, str]:
        """What is rotated, JSON-ready, as the papers call it."""
        factors = {
            "R2, of each head's values": hadamard_factors(len(self.heads[0]))
            if self.heads
            else None,
            "at run time, of what q, k, v and the MLP read": self.inputs,
            "R4, at run time before down_proj": self.down,
        }
        return {name: found.description for name, found in factors.items() if found is not None}


def encoder_rotations(shape: EncoderShape, *, online: bool, seed: int = 0) -> EncoderRotations:
    """Randomised Hadamard matrices for R2, the transform of what is read, and R4 where `online`.

    Raises:
        LoweringError: a width is odd, so that no Hadamard matrix is known.
    """
    heads = tuple(
        rotation_matrix(shape.head_dim, seed=seed + 1 + layer) for layer in range(shape.num_layers)
    )
    down = hadamard_factors(shape.intermediate_size) if online else None
    return EncoderRotations(heads, hadamard_factors(shape.hidden_size), down)


def rotate_encoder(model: EncoderModel, rotations: EncoderRotations) -> EncoderModel:
    """The encoder with rotated reads; the same function.

    Everything is multiplied in fp64 when a weight is read, and cast once to fp32.

    Args:
        model: not quantised.
        rotations: which; those at run time stand in `EncoderModel.reads`.
    """
    factors = {
        **dict.fromkeys(_READERS, rotations.inputs),
        "mlp.down_proj": rotations.down,
    }
    # One object for all that are rotated alike, so that a graph rotates each input once.
    reads = {
        f"layers.{index}.{linear}.weight": LinearInput(rotation=rotation)
        for index in range(model.shape.num_layers)
        for linear in model.shape.linears()
        if (rotation := factors.get(linear)) is not None
    }
    weights = _RotatedWeights(model.weights, rotations, reads)
    return replace(model, weights=weights, reads={**model.reads, **reads})


@torch.inference_mode()
def check_encoder_equivalence(
    model: EncoderModel, rotated: EncoderModel, values: Tensor
) -> dict[str, float]:
    """How far a rotated encoder is from the original one, in fp32, before anything is rounded.

    Args:
        model: the original.
        rotated: of `rotate_encoder`.
        values: token ids `[N, L]`, or pixels `[N, C, height, width]`.

    Returns:
        The largest difference of a number of the last layer's states, and their root mean square.

    Raises:
        ProofError: they differ by more than fp32 explains.
    """
    expected, found = (_final_states(m, values) for m in (model, rotated))
    difference, size = float((found - expected).abs().max()), float(expected.square().mean().sqrt())
    bound = EQUIVALENCE_BOUND * size
    result = {"state difference": difference, "state rms": size}
    if not difference <= bound:
        raise ProofError(
            expected=f"the rotated encoder's states within {bound:.2g} of the original's",
            came=f"they differ by {difference:.3g}",
            todo="report this with the checkpoint's name; a scheme without rotation works",
            details=result,
        )
    return result


def _final_states(model: EncoderModel, values: Tensor) -> Tensor:
    inputs = model.shape.input.names
    # Without padding.
    mask = torch.ones_like(values) if "attention_mask" in inputs else None
    types = torch.zeros_like(values) if "token_type_ids" in inputs else None
    encoder = load_encoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
    output: EncoderOutput = encoder(values, mask, types)
    return output.hidden[-1]


@dataclass(frozen=True)
class _RotatedWeights:
    source: ModelWeights
    rotations: EncoderRotations
    reads: dict[str, LinearInput] = field(default_factory=dict)

    def format(self, name: str) -> WeightFormat | None:
        return None

    def read(self, name: str) -> Tensor:
        stored = self.source.read(name)
        assert isinstance(stored, Tensor), f"{name} is quantised before it is rotated"
        if not name.startswith("layers."):
            return stored
        layer, linear, kind = parts_of(name)
        if not linear:
            return stored
        return self._linear(name, stored.double(), layer, linear, kind).float()

    def _linear(self, name: str, value: Tensor, layer: int, linear: str, kind: str) -> Tensor:
        """A weight, or a bias as a column of one."""
        heads = self.rotations.heads
        if linear == "self_attn.v_proj" and heads:
            column = value.unsqueeze(1) if kind == "bias" else value
            value = rotate_values(column, heads[layer]).view(value.shape)
        if linear == "self_attn.o_proj" and heads and kind == "weight":
            value = rotate_outputs(value, heads[layer])
        rotation = self.reads[name].rotation if name in self.reads else None
        return value if rotation is None else transform(value, rotation)
