"""A bundle's engine in TensorRT under a session, on this machine's GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from edgeattn.bundle.bundle import Bundle
from edgeattn.devices.probe import probe
from edgeattn.engine.encoder_execution import EncoderRunner
from edgeattn.engine.execution import DeviceCache, EngineRunner
from edgeattn.engine.record import Engine, choose_engine
from edgeattn.runtime.layout import Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TensorRtBackend:
    """A decoder's engine.

    Threads take turns: an engine has one set of bound addresses. A cache is good for one step,
    since the step after writes into its memory; see `edgeattn.engine.execution.DeviceCache`.

    Args:
        bundle: of the decoder.
        engine: a file of it; None for the newest that runs here.

    Raises:
        BundleError: no engine, a damaged one, or one of another graph.
        LoweringError: it was made for another GPU, processor or TensorRT, or does not load.
        MissingDependencyError: no GPU or no TensorRT.
        RuntimeInputError: the GPU's memory does not suffice.
    """

    def __init__(self, bundle: Bundle, engine: Path | str | None = None) -> None:
        self._runner, self._turn = EngineRunner(_engine(bundle, engine), bundle), Lock()

    def run(
        self,
        input_ids: NDArray[np.int64],
        past: int,
        layout: Layout | None,
        cache: DeviceCache | None,
    ) -> tuple[NDArray[np.float32], DeviceCache]:
        """See `edgeattn.runtime.backend.Backend.run`.

        Raises:
            LoweringError: the engine was built for other sizes.
            RuntimeInputError: the GPU fails, or the cache was taken by a step before.
        """
        batch, length = input_ids.shape
        told = layout or Layout.dense(batch, past, length)
        with self._turn:
            return self._runner.run(input_ids, told.attention_mask, told.position_ids, cache)

    def cache_bytes(self, cache: DeviceCache) -> int:
        """Memory of a cache on the GPU in bytes."""
        return cache.nbytes


class TensorRtEncoder:
    """An encoder's engine; arguments and errors as of `TensorRtBackend`."""

    def __init__(self, bundle: Bundle, engine: Path | str | None = None) -> None:
        self._runner, self._turn = EncoderRunner(_engine(bundle, engine), bundle), Lock()
        self._output = bundle.encoder_shape.output

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """See `edgeattn.runtime.backend.EncoderBackend.run`.

        Raises:
            LoweringError: the engine was built for other sizes.
            RuntimeInputError: the GPU fails.
        """
        with self._turn:
            return self._runner.run(feeds)[self._output]


def _engine(bundle: Bundle, named: Path | str | None) -> Engine:
    return choose_engine(bundle, probe(), None if named is None else Path(named))
