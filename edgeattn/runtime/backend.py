"""What runs a bundle's graph under a session, and how one is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgeattn.bundle.bundle import Bundle
from edgeattn.errors import UsageError, unknown_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeattn.runtime.layout import Layout

BackendName = Literal["onnxruntime", "tensorrt"]
BACKENDS: tuple[BackendName, ...] = ("onnxruntime", "tensorrt")


class Backend(Protocol):
    """A decoder, step by step; a cache is what only the backend that made it understands."""

    def run(
        self,
        input_ids: NDArray[np.int64],
        past: int,
        layout: Layout | None,
        cache: Any,
    ) -> tuple[NDArray[np.float32], Any]:
        """One step.

        Args:
            input_ids: `[B, T]`.
            past: P, slots of the cache.
            layout: of the tokens; None where no padding is among them or those before.
            cache: what the step before returned, or None for an empty one.

        Returns:
            Logits `[B, T, V]` (`[B, 1, V]` when the graph keeps the last only) and the new cache.

        Raises:
            RuntimeInputError: it fails, for one out of memory.
        """

    def cache_bytes(self, cache: Any) -> int:
        """Memory of a cache in bytes."""


class EncoderBackend(Protocol):
    """An encoder."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The graph's output for its inputs; floating-point ones are rounded to what it reads.

        Raises:
            RuntimeInputError: it fails, for one out of memory.
        """


@dataclass(frozen=True)
class BackendOptions:
    """What `edgeattn.runtime.Session.open` is asked for.

    Attributes:
        name: of the backend.
        provider: of ONNX Runtime: "cpu", "cuda" or "tensorrt".
        threads: of ONNX Runtime, for one operator; None takes every core.
        exact: of ONNX Runtime: multiply int4 weights in fp32.
        engine: of TensorRT: a file; None for the bundle's newest that runs here.
    """

    name: BackendName = "onnxruntime"
    provider: str = "cpu"
    threads: int | None = None
    exact: bool = False
    engine: Path | str | None = None

    def __post_init__(self) -> None:
        """Refuses what the backend would ignore.

        Raises:
            UsageError: an unknown backend, or an option of another one.
        """
        if self.name not in BACKENDS:
            raise unknown_name("backend", self.name, BACKENDS)
        for option in _OF_OTHERS[self.name]:
            if getattr(self, option) != _DEFAULTS[option]:
                (other,) = set(BACKENDS) - {self.name}
                raise UsageError(
                    expected=f"{option} together with backend {other}",
                    came=f"the backend is {self.name}",
                    todo=f"leave out {option}, or choose backend {other}",
                )


_OF_OTHERS = {"onnxruntime": ("engine",), "tensorrt": ("provider", "threads", "exact")}
_DEFAULTS = {field.name: field.default for field in fields(BackendOptions)}


def open_backend(bundle: Bundle, options: BackendOptions) -> Backend:
    """A backend for a decoder's bundle; raises as `edgeattn.runtime.Session.open`."""
    if options.name == "tensorrt":
        from edgeattn.runtime.tensorrt_backend import TensorRtBackend

        return TensorRtBackend(bundle, options.engine)
    from edgeattn.runtime.onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(
        bundle, provider=options.provider, threads=options.threads, exact=options.exact
    )


def open_encoder_backend(bundle: Bundle, options: BackendOptions) -> EncoderBackend:
    """A backend for an encoder's bundle; raises as `edgeattn.runtime.EncoderSession.open`."""
    if options.name == "tensorrt":
        from edgeattn.runtime.tensorrt_backend import TensorRtEncoder

        return TensorRtEncoder(bundle, options.engine)
    from edgeattn.runtime.onnxruntime_backend import OnnxRuntimeEncoder

    return OnnxRuntimeEncoder(
        bundle, provider=options.provider, threads=options.threads, exact=options.exact
    )
