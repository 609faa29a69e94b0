"""The GPU of this machine, asked through the driver's own library: no CUDA package is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LIBRARY = "libcuda.so.1"

# CUdevice_attribute, CUDA driver API.
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18


@dataclass(frozen=True)
class GpuFacts:
    """The first GPU that this process may use.

    Attributes:
        name: as the driver calls it.
        sm: compute capability as an int (87).
        memory_bytes: what it has; on a Jetson what it shares with the CPU.
        free_bytes: what it has left, 0 where it takes no further process.
        integrated: its memory is the CPU's.
    """

    name: str
    sm: int
    memory_bytes: int
    free_bytes: int
    integrated: bool = False


@dataclass(frozen=True)
class Driver:
    """What the driver's library says.

    Attributes:
        version: of CUDA that it supports, as "13.2"; None without a driver.
        gpu: None where `problem` says why there is none.
        problem: one clause, empty with a GPU.
    """

    version: str | None
    gpu: GpuFacts | None
    problem: str = ""


class CudaError(Exception):
    """A call that did not succeed, as a clause."""


def read_driver() -> Driver:
    """Asks the driver of this machine; never raises."""
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError:
        return Driver(None, None, f"there is no {LIBRARY}")
    version = None
    try:
        version = _version(cuda)
        return Driver(version, _first_gpu(cuda))
    except CudaError as error:
        return Driver(version, None, str(error))
    except AttributeError:  # a library of that name without these functions
        return Driver(version, None, f"{LIBRARY} is not the driver's")


def _version(cuda: ctypes.CDLL) -> str:
    """The newest CUDA the driver runs; needs no GPU."""
    number = ctypes.c_int()
    call(cuda, "cuDriverGetVersion", ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _first_gpu(cuda: ctypes.CDLL) -> GpuFacts:
    call(cuda, "cuInit", 0)
    count, device = ctypes.c_int(), ctypes.c_int()
    call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    if count.value < 1:
        raise CudaError("the driver sees no GPU")
    call(cuda, "cuDeviceGet", ctypes.byref(device), 0)
    name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
    call(cuda, "cuDeviceGetName", name, len(name), device)
    call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(total), device)
    return GpuFacts(
        name=name.value.decode(errors="replace"),
        sm=10 * _attribute(cuda, _MAJOR, device) + _attribute(cuda, _MINOR, device),
        memory_bytes=total.value,
        free_bytes=_free_bytes(cuda, device),
        integrated=bool(_attribute(cuda, _INTEGRATED, device)),
    )


def _attribute(cuda: ctypes.CDLL, attribute: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    call(cuda, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
    return value.value


def _free_bytes(cuda: ctypes.CDLL, device: ctypes.c_int) -> int:
    """Free memory, for which a context must be made: where none can be, nothing else can run."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        with _context(cuda, device):
            call(cuda, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    except CudaError:
        return 0
    return free.value


@contextmanager
def _context(cuda: ctypes.CDLL, device: ctypes.c_int) -> Iterator[None]:
    """The device's primary context; the caller's thread has its own again afterwards."""
    context = ctypes.c_void_p()
    call(cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        call(cuda, "cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            call(cuda, "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        call(cuda, "cuDevicePrimaryCtxRelease_v2", device)


def call(cuda: ctypes.CDLL, function: str, *arguments: object) -> None:
    """Calls a function of the driver.

    Raises:
        CudaError: it did not succeed; the driver's own words.
    """
    code = getattr(cuda, function)(*arguments)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        reason = (text.value or b"").decode(errors="replace") or f"error {code}"
        raise CudaError(f"{function} says: {reason}")
