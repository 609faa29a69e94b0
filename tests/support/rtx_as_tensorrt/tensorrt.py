"""Stands in for NVIDIA's enterprise TensorRT: TensorRT-RTX under its name.

The code for the flavour "tensorrt" then runs where no GPU is. What differs: TensorRT builds for the
GPU in the machine, so the builder here is told one that TensorRT-RTX knows (FAKE_TENSORRT_SM, 86).
"""

import os

import tensorrt_rtx
from tensorrt_rtx import *  # noqa: F403

__version__ = "11.0.0"


class Builder(tensorrt_rtx.Builder):
    """Builds for a GPU that need not be there."""

    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        name = f"SM{os.environ.get('FAKE_TENSORRT_SM', '86')}"
        config.set_compute_capability(getattr(tensorrt_rtx.ComputeCapability, name), 0)
        return config
