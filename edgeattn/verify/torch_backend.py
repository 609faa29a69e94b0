"""The decoder in PyTorch as a backend: the fp32 reference and the plain low-precision run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeattn.models.decoder import Decoder
from edgeattn.verify.cases import StepInputs


class TorchBackend:
    """Runs a loaded `Decoder`."""

    name = "torch"

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    @torch.inference_mode()
    def step(self, inputs: StepInputs, past: Mapping[str, object] | None) -> Mapping[str, object]:
        """See `edgeattn.verify.drive.Backend.step`."""
        decoder = self._decoder
        if past is None:
            cache = decoder.empty_cache(inputs.input_ids.shape[0])
        else:
            cache = tuple(
                (_tensor(past[f"present.{i}.key"]), _tensor(past[f"present.{i}.value"]))
                for i in range(decoder.shape.num_layers)
            )
        output = decoder(
            torch.from_numpy(inputs.input_ids),
            torch.from_numpy(inputs.attention_mask),
            torch.from_numpy(inputs.position_ids),
            cache,
        )
        named: dict[str, object] = {"logits": output.logits}
        for i, (key, value) in enumerate(output.present):
            named[f"present.{i}.key"], named[f"present.{i}.value"] = key, value
        named.update({f"hidden.{i}": value for i, value in enumerate(output.hidden)})
        return named

    def to_numpy(self, value: object) -> NDArray[np.float32]:
        """See `edgeattn.verify.drive.Backend.to_numpy`."""
        array: NDArray[np.float32] = _tensor(value).float().numpy()
        return array


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value
