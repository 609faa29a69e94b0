"""`edgeattn verify --backend triton` where it succeeds, and where it finds a wrong kernel.

Run by test_interpreted.py, with TRITON_INTERPRET=1 set before Triton is imported.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import case_sample

from edgeattn.bundle.bundle import GOLDEN_OPERATORS
from edgeattn.ops.recurrent_linear_attention import SPEC
from edgeattn.verify import triton_backend
from edgeattn.verify.operators import Sample, save_samples
from edgeattn.verify.triton_backend import check_triton

Kernel = Callable[..., Any]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """A gated node and, behind it, one with the delta rule, both in fp16."""
    cases = {case.name: replace(case, dtype="fp16") for case in SPEC.cases}
    names = {"first": "one-chunk", "second": "unequal-widths"}
    return [case_sample(SPEC, cases[case], node) for node, case in names.items()]


def late(kernel: Kernel) -> Kernel:
    """Decays a step after it should."""

    def run(*inputs: torch.Tensor, **attributes: Any) -> Any:
        decay = inputs[3]
        shifted = torch.cat([torch.zeros_like(decay[:, :, :1]), decay[:, :, :-1]], 2)
        return kernel(*inputs[:3], shifted, *inputs[4:], **attributes)

    return run


def scaled(output: int, kernel: Kernel) -> Kernel:
    """One output is 1 % too large."""

    def run(*inputs: torch.Tensor, **attributes: Any) -> Any:
        return tuple(
            1.01 * y if i == output else y for i, y in enumerate(kernel(*inputs, **attributes))
        )

    return run


WRONG = {
    "late decay": (late, ["y", "present_state"]),
    "scaled output": (functools.partial(scaled, 0), ["y"]),
    "scaled state": (functools.partial(scaled, 1), ["present_state"]),
}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes the kernel wrong for the delta rule."""

    def patch(wrong: Callable[[Kernel], Kernel]) -> None:
        right = SPEC.kernel()
        assert right is not None
        assert SPEC.triton is not None

        def run(*inputs: torch.Tensor, **attributes: Any) -> Any:
            kernel = wrong(right) if attributes["delta"] else right
            return kernel(*inputs, **attributes)

        monkeypatch.setattr(SPEC.triton.replace(":", "."), run)

    return patch


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_right_kernels_pass(samples: list[Sample], dtype: str) -> None:
    case = next(case for case in SPEC.cases if case.name == "channels")
    samples = [*samples, case_sample(SPEC, replace(case, dtype=dtype), "third")]
    agreement = check_triton(samples, device="cpu")
    assert (agreement.passed, agreement.first_bad, agreement.backend) == (True, None, "triton")
    nodes, outputs = ("first", "second", "third"), [tensor.name for tensor in SPEC.outputs]
    rows = [row.tensor for row in agreement.comparisons]
    assert rows == [f"operator {node}.{name}" for node in nodes for name in outputs]


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_kernel_is_named(
    samples: list[Sample], kind: str, spoil: Callable[..., None]
) -> None:
    wrong, outputs = WRONG[kind]
    spoil(wrong)
    agreement = check_triton(samples, device="cpu")
    assert (agreement.passed, agreement.first_bad) == (
        False,
        "operator second (RecurrentLinearAttention)",
    )
    rows = [row.tensor for row in agreement.comparisons if not row.passed]
    assert rows == [f"operator second.{name}" for name in outputs]


def test_bf16_reaches_the_kernel_as_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in its place, as the interpreter computes bf16 wrongly."""
    given = []

    def reference(*inputs: torch.Tensor, **attributes: Any) -> Any:
        given.append([str(x.dtype).removeprefix("torch.") for x in inputs])
        return SPEC.reference(*inputs, **attributes)

    assert SPEC.triton is not None
    monkeypatch.setattr(SPEC.triton.replace(":", "."), reference)
    case = next(case for case in SPEC.cases if case.dtype == "bf16")
    assert check_triton([case_sample(SPEC, case, "one")], device="cpu").passed
    assert given == [["bfloat16"] * 3 + ["float32"] * 4]


@pytest.fixture
def bundle(
    samples: list[Sample], tiny_bundle: Path, changed: Callable[..., Path], tmp_path: Path
) -> Path:
    """A bundle that keeps samples of an operator with a kernel, which no exported model has yet."""
    save_samples(samples, tmp_path / "operators.npz")
    return changed(tiny_bundle, {GOLDEN_OPERATORS: (tmp_path / "operators.npz").read_bytes()})


def test_the_command_line_proves_and_refuses_kernels(
    bundle: Path,
    tiny_bundle: Path,
    edgeattn: Callable[..., Any],
    spoil: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_cpu = functools.partial(check_triton, device="cpu")
    monkeypatch.setattr(triton_backend, "check_triton", on_cpu)
    command = ("verify", bundle, "--backend", "triton")
    done = edgeattn(*command, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["passed"] is True
    assert [agreement["backend"] for agreement in facts["agreements"]] == ["triton"]
    assert len(facts["agreements"][0]["comparisons"]) == 2 * len(SPEC.outputs)
    assert edgeattn(*command).exit_code == 0

    spoil(late)
    done = edgeattn(*command)
    assert done.exit_code == 1, done.output
    assert "triton within" in done.output
    assert "the first error is in operator second" in done.output

    done = edgeattn("verify", tiny_bundle, "--backend", "triton")
    assert done.exit_code == 1, done.output
    assert "samples of edgeattn's operators" in done.output
