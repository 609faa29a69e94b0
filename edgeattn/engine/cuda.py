"""Memory and a stream on the first GPU, through the driver's library: no CUDA package is needed."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from edgeattn.devices.libcuda import LIBRARY, CudaError, call
from edgeattn.errors import MissingDependencyError, RuntimeInputError


class Gpu:
    """The first GPU: its primary context, which TensorRT uses too, and a stream of its own.

    Raises:
        MissingDependencyError: there is no driver or no GPU.
    """

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL(LIBRARY)
            device, self._context = ctypes.c_int(), ctypes.c_void_p()
            self.stream = ctypes.c_void_p()
            call(self._cuda, "cuInit", 0)
            call(self._cuda, "cuDeviceGet", ctypes.byref(device), 0)
            call(self._cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
            with self.current():
                call(self._cuda, "cuStreamCreate", ctypes.byref(self.stream), 1)  # non-blocking
        except (OSError, CudaError) as error:
            raise MissingDependencyError(
                expected="an NVIDIA GPU to run an engine on",
                came=f"there is none that works ({error})",
                todo="run it on the device, or use ONNX Runtime here",
            ) from error
        # as of `Memory`, which keeps this object alive for as long as there is any
        weakref.finalize(self, _release, self._cuda, self.stream, device).atexit = False

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the context this thread's; its own comes back afterwards."""
        self._run("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._run("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, nbytes: int) -> Memory:
        """Fresh memory, freed with its last reference.

        Args:
            nbytes: its size; what is empty gets an address all the same.

        Raises:
            RuntimeInputError: there is not enough.
        """
        address = ctypes.c_uint64()
        try:
            size = ctypes.c_size_t(max(nbytes, 1))
            call(self._cuda, "cuMemAlloc_v2", ctypes.byref(address), size)
        except CudaError as error:
            raise RuntimeInputError(
                expected=f"{nbytes:,} bytes of free memory on the GPU",
                came=str(error),
                todo="close other programs, or give fewer rows or tokens",
            ) from error
        return Memory(self, address.value, nbytes)

    def clear(self, memory: Memory) -> None:
        """Makes all bytes 0, behind what the stream does already."""
        size, value = ctypes.c_size_t(memory.nbytes), ctypes.c_ubyte(0)
        address = ctypes.c_uint64(memory.address)
        if memory.nbytes:
            self._run("cuMemsetD8Async", address, value, size, self.stream)

    def upload(self, memory: Memory, array: NDArray[np.generic]) -> None:
        """Copies a dense array to the GPU, behind what the stream does already.

        The array must live until `synchronize`.
        """
        if array.nbytes:
            source = ctypes.c_void_p(array.ctypes.data)
            size, address = ctypes.c_size_t(array.nbytes), ctypes.c_uint64(memory.address)
            self._run("cuMemcpyHtoDAsync_v2", address, source, size, self.stream)

    def download(self, array: NDArray[np.generic], memory: Memory) -> None:
        """Fills a dense array from the GPU and waits for it."""
        if array.nbytes:
            target = ctypes.c_void_p(array.ctypes.data)
            size, address = ctypes.c_size_t(array.nbytes), ctypes.c_uint64(memory.address)
            self._run("cuMemcpyDtoHAsync_v2", target, address, size, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Waits for all that the stream was given.

        Raises:
            RuntimeInputError: some of it failed.
        """
        self._run("cuStreamSynchronize", self.stream)

    def _run(self, function: str, *arguments: object) -> None:
        try:
            call(self._cuda, function, *arguments)
        except CudaError as error:
            raise RuntimeInputError(
                expected="the GPU to finish its work",
                came=str(error),
                todo="restart the program, for the driver's context may be lost",
            ) from error

    def _free(self, address: int) -> None:
        with self.current():
            self._cuda.cuMemFree_v2(ctypes.c_uint64(address))


def _release(cuda: ctypes.CDLL, stream: ctypes.c_void_p, device: ctypes.c_int) -> None:
    cuda.cuStreamDestroy_v2(stream)
    cuda.cuDevicePrimaryCtxRelease_v2(device)


class Memory:
    """A piece of the GPU's memory.

    Attributes:
        address: of its first byte.
        nbytes: its size.
    """

    def __init__(self, gpu: Gpu, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        # the end of the process frees it anyway, and by then the driver may be gone
        weakref.finalize(self, gpu._free, address).atexit = False
