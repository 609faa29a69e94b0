"""A decoder whose blocks lie on several GPUs, one after the other, by accelerate.

A step of training sees one window of text, so that there is no batch to share out: what several
GPUs add is memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from edgeattn.errors import MissingDependencyError
from edgeattn.models.decoder import Decoder


def training_devices() -> list[torch.device]:
    """All GPUs, or the CPU where there is none.

    Raises:
        MissingDependencyError: there are several GPUs, and accelerate is not installed.
    """
    count = torch.cuda.device_count()
    if count > 1 and find_spec("accelerate") is None:
        raise MissingDependencyError(
            expected=f"accelerate, to train on {count} GPUs",
            came="it cannot be imported",
            todo="pip install accelerate, or set CUDA_VISIBLE_DEVICES=0 to train on one of them",
        )
    return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]


def spread(decoder: Decoder, devices: Sequence[torch.device]) -> Decoder:
    """Moves a decoder in place; with several devices each gets blocks that follow each other.

    Embedding, final norm, LM head and so the logits are on the first.

    Args:
        decoder: in any form.
        devices: one or more.
    """
    if len(devices) == 1:
        return decoder.to(devices[0])
    from accelerate import dispatch_model

    places = {name: devices[0] for name, _ in decoder.named_children() if name != "layers"}
    count = len(decoder.layers)
    places |= {f"layers.{i}": devices[i * len(devices) // count] for i in range(count)}
    for name, device in places.items():
        decoder.get_submodule(name).to(device)
    for name, buffer in decoder.named_buffers(recurse=False):  # accelerate leaves them behind
        decoder.register_buffer(name, buffer.to(devices[0]), persistent=False)
    # Its hooks move what a block reads to where the block is.
    dispatch_model(decoder, places, main_device=devices[0], force_hooks=True)
    return decoder
