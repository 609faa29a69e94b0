"""DINOv2 encoders from the initialisers of an ONNX graph, as torch's older exporter writes them.

That exporter folds the transposition of a linear layer's weight and forgets its name; the bias that
is added to the product still has one. What the initialisers do not say (heads, epsilon) is read
from the nodes around them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.encoder_shape import EncoderShape, PatchInput
from edgeattn.errors import CheckpointError
from edgeattn.models.encoder_config import encoder_shape_from_config, stored_name
from edgeattn.models.encoder_families import (
    ENCODER_FAMILIES,
    PATCH_POSITIONS,
    encoder_parameters,
)

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

_FAMILY = ENCODER_FAMILIES["dinov2"]
_CLASS_TOKEN = "embeddings.cls_token"


@dataclass(frozen=True)
class OnnxEncoder:
    """A backbone within an ONNX graph; what comes behind it is left out.

    Attributes:
        shape: the architecture.
        config: as a Hugging Face config.json would say it.
        identity: what the manifest says of the source.
        arrays: stored values by Hugging Face's names; weights as [outputs, inputs].
        positions: of class token and patches, `[1, 1, d]` and `[1, N, d]`, on the trained grid.
    """

    shape: EncoderShape
    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    arrays: Mapping[str, NDArray[np.floating]] = field(repr=False)
    positions: tuple[NDArray[np.floating], NDArray[np.floating]] = field(repr=False)

    def read(self, name: str) -> torch.Tensor:
        """See `WeightReader.read`; positions are scaled to the grid of the graph's images."""
        import torch

        if name != PATCH_POSITIONS:
            return torch.from_numpy(np.array(self.arrays[stored_name(_FAMILY, name)]))
        first, patches = (torch.from_numpy(np.array(array)) for array in self.positions)
        read = self.shape.input
        assert isinstance(read, PatchInput)
        side = _square_root(patches.shape[1])
        grid = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        size = (read.height // read.patch, read.width // read.patch)
        # As DINOv2 scales them; Resize of ONNX has the same coefficients.
        scaled = torch.nn.functional.interpolate(
            grid.float(), size=size, mode="bicubic", align_corners=False
        )
        return torch.cat((first.float(), scaled.flatten(2).transpose(1, 2)), dim=1)


def open_onnx_encoder(path: Path, *, task: str | None = None) -> OnnxEncoder:
    """Reads the DINOv2 backbone of an ONNX file.

    Args:
        path: the file.
        task: what comes out; there is no head, so that only token states do.

    Raises:
        CheckpointError: it is no ONNX file, or holds no such backbone.
    """
    graph = _Graph.load(path)
    prefix = graph.prefix()
    arrays = graph.named(prefix)
    config = graph.config(prefix, arrays)
    shape = encoder_shape_from_config(config, task=task)
    for name, size in encoder_parameters(shape).items():
        stored = stored_name(_FAMILY, name)
        found = arrays.get(stored)
        if name != PATCH_POSITIONS and (found is None or found.shape != size):
            came = "there is none" if found is None else f"its shape is {list(found.shape)}"
            raise _refused(f"an initialiser {prefix}{stored} of shape {list(size)}", came)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    files = {path.name: path.stat().st_size}
    identity = {"format": "onnx", "files": files, "fingerprint": digest}
    return OnnxEncoder(shape, config, identity, arrays, graph.positions(shape.hidden_size))


class _Graph:
    """An ONNX graph with what is needed to find one's way in it."""

    def __init__(self, proto: ModelProto) -> None:
        from onnx import numpy_helper

        graph = proto.graph
        self.inputs = graph.input
        self.arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        for node in graph.node:
            held = [a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"]
            if held:
                self.arrays[node.output[0]] = numpy_helper.to_array(held[0])
        self.initializers = {t.name for t in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.nodes = list(graph.node)

    @classmethod
    def load(cls, path: Path) -> _Graph:
        import onnx
        from google.protobuf.message import DecodeError

        try:
            return cls(onnx.load(path))
        except (DecodeError, ValueError, OSError) as error:
            raise _refused(f"an ONNX graph in {path}", "it does not parse") from error
        except onnx.checker.ValidationError as error:
            came = "a file of its external data is missing or damaged"
            raise _refused(f"an ONNX graph in {path}, whole", came) from error

    def prefix(self) -> str:
        """What stands before Hugging Face's names, such as "backbone."."""
        for name in sorted(self.initializers):
            if name.endswith(_CLASS_TOKEN):
                return str(name).removesuffix(_CLASS_TOKEN)
        raise _refused("the class token of a vision transformer among the initialisers", "none is")

    def named(self, prefix: str) -> dict[str, NDArray[np.floating]]:
        """Values of the backbone by Hugging Face's names, weights of linear layers among them."""
        found = {
            name.removeprefix(prefix): self.arrays[name]
            for name in self.initializers
            if name.startswith(prefix)
        }
        for node in self.nodes:
            bias, product = self._bias_and_product(node, prefix)
            if product is not None:
                weight = np.ascontiguousarray(self.arrays[product.input[1]].T)
                found[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = weight
        return found

    def _bias_and_product(self, node: NodeProto, prefix: str) -> tuple[str, NodeProto | None]:
        """Of the addition of a bias to a product with a weight that has lost its name."""
        if node.op_type != "Add":
            return "", None
        names = [str(name) for name in node.input]
        for bias, other in (names, names[::-1]):
            product = self.producers.get(other)
            is_bias = bias.startswith(prefix) and bias.endswith(".bias")
            if is_bias and product is not None and product.op_type == "MatMul":
                known = product.input[1] in self.initializers
                return bias, product if known else None
        return "", None

    def config(self, prefix: str, arrays: Mapping[str, NDArray[np.floating]]) -> dict[str, Any]:
        """The config.json of the backbone."""
        patches = arrays.get("embeddings.patch_embeddings.projection.weight")
        block = "encoder.layer.0."
        up = arrays.get(f"{block}mlp.fc1.bias")
        is_whole = f"{block}layer_scale1.lambda1" in arrays
        if patches is None or up is None or (patches.ndim, up.ndim) != (4, 1) or not is_whole:
            raise _refused(
                "the layers of DINOv2 behind the class token",
                "some are missing or of another shape",
            )
        if not any(node.op_type == "Erf" for node in self.nodes):
            raise _refused("an MLP with activation gelu", "the graph has no Erf")
        layers = {name.split(".")[2] for name in arrays if name.startswith("encoder.layer.")}
        ratio = len(up) / patches.shape[0]
        size = [d.dim_value for i in self.inputs for d in i.type.tensor_type.shape.dim][2:]
        if len(self.inputs) != 1 or len(size) != 2 or not all(size):
            raise _refused("one input, images of a fixed size", "the graph has another one")
        return {
            "model_type": "dinov2",
            "architectures": ["Dinov2Model"],
            "hidden_size": patches.shape[0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": self._heads(f"{prefix}{block}attention.attention.query.bias"),
            "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
            "layer_norm_eps": self._epsilon(f"{prefix}{block}norm1.weight"),
            "hidden_act": "gelu",
            "image_size": size,
            "patch_size": patches.shape[2],
            "num_channels": patches.shape[1],
            "qkv_bias": True,
        }

    def _heads(self, bias: str) -> int:
        """What the queries are cut into: the last but one size of the Reshape behind their bias."""
        queries = next((n.output[0] for n in self.nodes if bias in n.input), "")
        for node in self.nodes:
            if node.op_type == "Reshape" and node.input[0] == queries:
                sizes = self.producers.get(node.input[1])
                last = self.arrays.get(sizes.input[2]) if sizes and len(sizes.input) == 4 else None
                if last is not None:
                    return int(last.item())
        raise _refused("queries that are cut into a known number of heads", "the graph hides it")

    def _epsilon(self, gain: str) -> float:
        """What is added to the variance in the norm that ends with this gain."""
        node = next((n for n in self.nodes if gain in n.input), None)
        for _ in range(4):  # Mul, Div, Sqrt, Add
            if node is None:
                break
            constants = [self.arrays[name] for name in node.input if name in self.arrays]
            if node.op_type == "Add" and constants:
                return float(constants[0].item())
            sources = [self.producers[name] for name in node.input if name in self.producers]
            computed = [n for n in sources if n.op_type != "Constant"]
            node = computed[-1] if computed else None
        raise _refused("a LayerNorm with a constant epsilon", "the graph has none")

    def positions(self, width: int) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Positions of class token and patches, which have lost their names."""
        found = [
            self.arrays[name]
            for name in self.initializers
            if self.arrays[name].ndim == 3
            and self.arrays[name].shape[::2] == (1, width)
            and not name.endswith(_CLASS_TOKEN)
        ]
        first, *rest = sorted(found, key=lambda array: array.shape[1]) or [np.zeros((1, 0, 0))]
        if len(rest) != 1 or first.shape[1] != 1 or not _square_root(rest[0].shape[1]):
            raise _refused("positions of the class token and of a square of patches", "none are")
        return first, rest[0]


def _square_root(count: int) -> int:
    """The side of a square of so many patches, 0 where there is none."""
    side = round(count**0.5)
    return side if side * side == count else 0


def _refused(expected: str, came: str) -> CheckpointError:
    return CheckpointError(
        expected=expected,
        came=came,
        todo="pass a Hugging Face directory, or an ONNX file of a DINOv2 backbone",
    )
