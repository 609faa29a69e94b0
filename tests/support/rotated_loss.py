"""The loss of a fake-quantised network under given rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeattn.models.model import Model
from edgeattn.quant.scheme import Objective, Scheme
from edgeattn.transforms.rotatable import RotatableModel
from edgeattn.transforms.rotate import Rotations


def loss_of(
    model: Model,
    scheme: Scheme | None,
    rotations: Rotations,
    windows: Tensor,
    objective: Objective = "kl",
) -> float:
    """In nats per token; arguments as for `RotatableModel` and its `loss`."""
    network = RotatableModel(model, scheme, down=rotations.down)
    assert rotations.residual is not None
    with torch.no_grad():
        return float(network.loss(rotations.residual, rotations.heads, windows, objective))
