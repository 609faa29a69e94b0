"""The model whose figures the planner's tests know."""

from __future__ import annotations

import pytest
from model_configs import SMOLLM2_135M

from edgeattn.models.huggingface import shape_from_config
from edgeattn.shape import ModelShape


@pytest.fixture
def shape() -> ModelShape:
    """SmolLM2-135M."""
    return shape_from_config(SMOLLM2_135M)
