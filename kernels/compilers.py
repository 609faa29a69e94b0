"""Child processes that compile kernels: LLVM aborts on code it does not like, and the child pays.

Each takes one task after another, because Triton takes seconds to import. This module, run with
`-m`, is the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from edgeattn.errors import EdgeattnError
from edgeattn.kernels.source_key import source_key

_CHILD_MODULE = "edgeattn.kernels.compilers"
_START_S, _EXIT_S = 120.0, 10.0
_LINE = 300  # characters of a message that a sentence quotes
_PR_SET_PDEATHSIG = 1
# Variables with which Triton, LLVM and ptxas let a user change what they generate.
_COMPILER_VARIABLES = (
    *("TRITON_", "PTXAS_", "NVPTX_", "LLVM_", "MLIR_", "AMDGCN_"),
    *("DISABLE_", "ALLOW_LHS_", "STORE_", "USE_IR_LOC"),
)


class Task(Protocol):
    """What a compiler is given.

    Attributes:
        request: the function, its signature, constants and options, and the SM; JSON-ready.
    """

    @property
    def request(self) -> Mapping[str, Any]: ...  # noqa: D102


_Task = TypeVar("_Task", bound=Task)


def compile_tasks(
    tasks: Sequence[_Task], processes: int, timeout_s: float
) -> Generator[tuple[_Task, dict[str, Any]], None, None]:
    """What compilers answer, as it comes; close the iterator to stop them."""
    waiting = deque(tasks)
    compilers: list[_Compiler[_Task]] = []
    # Leftovers of compilers that were killed are in there too.
    with tempfile.TemporaryDirectory(prefix="edgeattn-aot-", ignore_cleanup_errors=True) as folder:
        try:
            while waiting or compilers:
                while waiting and len(compilers) < processes:
                    compilers.append(_Compiler(Path(folder), timeout_s, waiting.popleft()))
                pause = max(0.0, min(c.deadline for c in compilers) - time.monotonic())
                speaking = wait([c.connection for c in compilers], pause)
                for compiler in tuple(compilers):
                    outcome = compiler.poll(compiler.connection in speaking)
                    if outcome is None:
                        continue
                    yield compiler.task, outcome
                    if waiting and compiler.alive:
                        compiler.give(waiting.popleft())
                    else:
                        compilers.remove(compiler)
                        compiler.kill()
        finally:
            for compiler in compilers:
                compiler.kill()


class _Compiler(Generic[_Task]):
    """A child process that compiles one task after another.

    Attributes:
        task: what it was given last.
        deadline: when, by `time.monotonic`, it is late.
        alive: whether it can be given another.
        connection: over which it answers.
    """

    def __init__(self, folder: Path, timeout_s: float, task: _Task) -> None:
        self._timeout_s = timeout_s
        self._ready = False
        self._log = folder / f"{uuid.uuid4().hex}.log"
        self.connection, theirs = Pipe()
        with theirs, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _CHILD_MODULE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                # `-m` puts the working directory on the child's import path: let it be ours
                cwd=folder,
                env=_child_environment(folder),
                # Ctrl-C is for the parent; and ptxas, a child of the child, is killed with it.
                start_new_session=True,
            )
        self.alive = True
        self.give(task)
        self.deadline = time.monotonic() + _START_S

    def give(self, task: _Task) -> None:
        """Starts on a task."""
        self.task = task
        self._said = self._log.stat().st_size
        self.deadline = time.monotonic() + self._timeout_s
        # A child that died meanwhile is found by `poll`.
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(task.request)

    def poll(self, speaking: bool) -> dict[str, Any] | None:
        """The answer, or how it died; None while it works.

        Args:
            speaking: whether the connection can be read.
        """
        if speaking:
            try:
                answer: dict[str, Any] = self.connection.recv()
            except (EOFError, ConnectionResetError):
                # Its own end tells more than ours.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_EXIT_S)
                self.kill()
                return self._died(_exit_words(self._process.returncode))
            if self._ready:
                if "error" in answer and (line := _telling_line(self._said_since())):
                    answer["error"] += f" ({line})"
                return answer
            self._ready = True
            self.deadline = time.monotonic() + self._timeout_s
        elif time.monotonic() > self.deadline:
            limit = self._timeout_s if self._ready else _START_S
            self.kill()
            return self._died(f"gave no result in {limit:g} s and was killed")
        return None

    def kill(self) -> None:
        """Ends the child and what it started."""
        self.alive = False
        self.connection.close()
        # It was not waited for yet, so that its number is no other process's.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _said_since(self) -> str:
        """What went to its standard output and error for the task."""
        with self._log.open("rb") as log:
            log.seek(self._said)
            return log.read().decode(errors="replace")

    def _died(self, how: str) -> dict[str, Any]:
        said = self._said_since()
        if not self._ready:
            # Python says what it could not import in its last line.
            line = (said.strip().splitlines() or ["it said nothing"])[-1][:_LINE]
            raise EdgeattnError(
                expected="a child process that compiles kernels",
                came=f"it {how} ({line})",
                todo="install edgeattn[kernels] again",
            )
        line = _telling_line(said)
        return {"error": f"the compiler {how}" + (f" ({line})" if line else "")}


def _exit_words(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        # nobody but the kernel's memory guard sends it to a child of ours that was in time
        return f"died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"died of signal {-code}"


def _telling_line(text: str) -> str:
    """The first line about an error, among dumps of code and stacks; empty without one."""
    lines = (line.strip() for line in text.splitlines())
    telling = re.compile(r"error|assert|fatal|out of memory", re.IGNORECASE)
    return next((line[:_LINE] for line in lines if telling.search(line)), "")


def _child_environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_COMPILER_VARIABLES)}
    return {
        **kept,
        # The child finds the modules that the parent found, in a script's folder too.
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        # Line numbers make cubins four times as large, and other ones in another folder.
        "TRITON_DISABLE_LINE_INFO": "1",
        "TMPDIR": str(folder),
    }


def _die_with_parent() -> None:
    # a parent that is killed cannot stop us: ask the kernel to
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(connection: Connection) -> None:
    """The child's life: answers each request with a cubin and what is known of it, or an error."""
    importlib.import_module("triton")
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            answer = _compile(request)
        except Exception as error:
            answer = {"error": _words(error)}
        connection.send(answer)


def _compile(request: Mapping[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = request["function"]
    function = getattr(importlib.import_module(module), name)
    if source_key(function) != request["source"]:
        raise RuntimeError("its source was changed meanwhile")
    attributes = {(i,): [["tt.divisibility", n]] for i, n in request["attributes"].items()}
    source = ASTSource(function, request["signature"], request["constants"], attributes)
    # Triton has a cache of its own, which may hold what was compiled with other variables set.
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        target = GPUTarget("cuda", request["sm"], 32)
        compiled = triton.compile(source, target=target, options=request["options"])
    metadata = compiled.metadata
    return {
        "cubin": compiled.asm["cubin"],
        "entry": metadata.name,
        "shared": metadata.shared,
        "warps": metadata.num_warps,
        "scratch": metadata.global_scratch_size + metadata.profile_scratch_size,
        "tensor_memory": metadata.tmem_size or 0,
        "parameters": _parameters(compiled.asm["ptx"]),
    }


def _parameters(ptx: str) -> tuple[str, ...]:
    """Types of the parameters of the one kernel in it."""
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", ptx)
    return tuple(re.findall(r"\.param\s+\.(\w+)", entry[1])) if entry else ()


def _words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " | ".join(lines[:3])
    if "CompilationError" in type(error).__name__:
        # Triton's own errors show code with a mark below it, and then, or in their cause, why.
        if (cause := error.__cause__) is not None and (not lines or lines[-1] == "^"):
            return _words(cause) if isinstance(cause, Exception) else str(cause)
        text = next((line for line in reversed(lines) if line != "^"), "")
    return f"{type(error).__name__}: {text}"[:_LINE]


if __name__ == "__main__":
    _die_with_parent()
    _serve(Connection(int(sys.argv[1])))
