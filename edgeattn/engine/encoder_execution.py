"""Runs an engine of an encoder in TensorRT on this machine's GPU: inputs in, outputs out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgeattn.engine.loaded import LoadedEngine


class EncoderRunner(LoadedEngine):
    """An engine of an encoder; see `LoadedEngine`."""

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.float32]]:
        """Runs the encoder once.

        Args:
            inputs: by the names the graph gives them; rounded to what it reads.

        Returns:
            All outputs by name, in fp32.

        Raises:
            LoweringError: the engine was built for other sizes.
            RuntimeInputError: the GPU fails, for one out of memory.
        """
        with self._gpu.current():
            self._choose_profile({n: a.shape for n, a in inputs.items()}, of=next(iter(inputs)))
            alive = [self._feed(name, array) for name, array in inputs.items()]
            outputs = {name: self._output(name) for name in self._dtypes if name not in inputs}
            self._execute()
            del alive
            return {name: self._download(name, *output) for name, output in outputs.items()}
