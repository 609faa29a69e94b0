"""A kernel's key is the same in every process, and another one for other code."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: install edgeattn[kernels]"
)

ALL_KEYS = """
    import json, sys
    from edgeattn.kernels.source_key import source_key
    from edgeattn.kernels.variants import all_kernels

    kernels = sorted(all_kernels().values(), key=lambda k: k.name, reverse="reverse" in sys.argv)
    if "triton" in sys.argv:
        for kernel in kernels:
            kernel.function.cache_key
    print(json.dumps({kernel.name: source_key(kernel.function) for kernel in kernels}))
"""
FUNCTIONS = """
    import triton
    import triton.language as tl

    import source_key_callees as callees
    import source_key_package.inner

    FIRST, SECOND = callees.far, callees.other
    STEP = tl.constexpr(16)

    @triton.jit
    def near(x):
        return x * STEP

    def make(factor: tl.constexpr):
        @triton.jit
        def times(x, shift=2):
            return x * factor + shift

        return times

    captured = make(tl.constexpr(5))

    @triton.jit
    def kernel(x, y, BLOCK: tl.constexpr):
        place = tl.arange(0, BLOCK)
        row = near(callees.far(tl.load(x + place)))
        row = FIRST(row) - SECOND(row) + source_key_package.inner.added(row)
        tl.store(y + place, row * captured(row))
"""
CALLEES = """
    import triton
    import triton.language as tl

    SHIFT = tl.constexpr(3)

    @triton.jit
    def far(x):
        return x + SHIFT

    @triton.jit
    def other(x):
        return x - 7
"""
PACKAGED = """
    import triton
    import triton.language as tl

    SCALE = tl.constexpr(9)

    @triton.jit
    def added(x):
        return x + SCALE
"""
MODULES = {
    "source_key_package": "",
    "source_key_package.inner": PACKAGED,
    "source_key_callees": CALLEES,
    "source_key_functions": FUNCTIONS,
}


@pytest.fixture
def key_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function from a replacement of text to the key of `kernel` in that code."""
    from edgeattn.kernels.source_key import source_key

    def key(old: str = "", new: str = "") -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "source_key_package").mkdir(parents=True)
        assert old in "".join(MODULES.values())
        for name, text in MODULES.items():
            file = folder / (name.replace(".", "/") + ("" if text else "/__init__") + ".py")
            file.write_text(textwrap.dedent(text.replace(old, new) if old else text))
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            kernel = importlib.import_module("source_key_functions").kernel
            for name in MODULES:
                del sys.modules[name]
        found: str = source_key(kernel)
        return found

    return key


def test_the_same_in_every_process_and_order() -> None:
    """Triton's own key is not: it depends on which kernel's was read first."""
    assert all_keys() == all_keys("reverse") == all_keys("triton")


def test_the_same_for_the_same_code(key_with: Callable[..., str]) -> None:
    assert key_with() == key_with()
    assert key_with("import triton\n", "\n\n    import triton\n") == key_with(), "lines moved"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * STEP", "x + STEP"),
        ("x + SHIFT", "x - SHIFT"),
        ("constexpr(16)", "constexpr(32)"),
        ("constexpr(3)", "constexpr(4)"),
        ("constexpr(3)", "constexpr(3.0)"),
        ("constexpr(3)", 'constexpr("3")'),
        ("constexpr(5)", "constexpr(6)"),
        ("constexpr(9)", "constexpr(10)"),
        ("x + SCALE", "x * SCALE"),
        ("callees.far, callees.other", "callees.other, callees.far"),
        ("shift=2", "shift=3"),
        ("@triton.jit\n    def far", "@triton.jit(noinline=True)\n    def far"),
        ("tl.arange(0, BLOCK)", "tl.arange(0, BLOCK) + 1"),
    ],
)
def test_another_for_other_code(key_with: Callable[..., str], old: str, new: str) -> None:
    assert key_with(old, new) != key_with()


def all_keys(*arguments: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ALL_KEYS), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    keys: dict[str, str] = json.loads(done.stdout)
    return keys
