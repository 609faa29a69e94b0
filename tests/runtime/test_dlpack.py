"""Tensors in and out without a copy, and those that cannot be lent."""

from __future__ import annotations

import numpy as np
import pytest

from edgeattn.errors import RuntimeInputError
from edgeattn.runtime import Session, generate
from edgeattn.runtime.arrays import as_array

torch = pytest.importorskip("torch")
ROW = [1, 403, 407, 261, 378]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16, torch.uint8])
def test_a_tensor_lends_its_memory(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    for given in (tensor, tensor.T, tensor[1:, ::2]):
        found = as_array("x", given)
        assert found.ctypes.data == given.data_ptr()
        assert found.tolist() == given.tolist()


def test_a_session_takes_tensors(stories: Session) -> None:
    ids, mask = np.array([ROW, [*ROW[:3], 0, 0]]), np.array([[1] * 5, [1, 1, 1, 0, 0]])
    expected = stories.run(ids, attention_mask=mask).logits
    for kind in (torch.int64, torch.bool, torch.int32):
        found = stories.run(torch.from_numpy(ids), attention_mask=torch.tensor(mask).to(kind))
        np.testing.assert_array_equal(found.logits, expected)
    wanted = generate(stories, ROW, max_new_tokens=4).token_ids
    prompt = torch.tensor(ROW, dtype=torch.int32)
    assert generate(stories, prompt, max_new_tokens=4).token_ids == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["concat", "in place"])
def test_torch_takes_logits_without_a_copy(form, stories, export_tiny) -> None:
    session = stories if form == "concat" else Session.open(export_tiny("cpu", dtype="fp32"))
    assert (session.bundle.manifest.lowering["kv_cache"] == "concat") == (form == "concat")
    prompt = session.run([ROW[:1] * 4])
    for logits in (prompt.logits, session.run([[5]], prompt.state).logits):
        assert logits.flags.writeable
        tensor = torch.from_dlpack(logits)
        assert tensor.data_ptr() == logits.ctypes.data
        tensor[0, 0, 3] = 77.0
        assert logits[0, 0, 3] == 77.0


def test_torch_keeps_logits_whose_array_is_gone(export_tiny) -> None:
    session = Session.open(export_tiny("cpu", dtype="fp32"))
    step = session.run([[5, 6, 7]])
    kept = [torch.from_dlpack(step.logits)]
    expected = [step.logits.copy()]
    for token in range(4):
        step = session.run([[token]], step.state)
        kept.append(torch.from_dlpack(step.logits))
        expected.append(step.logits.copy())
    del step
    session.run([[9, 9, 9]])
    for found, wanted in zip(kept, expected, strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted)


class OnGpu:
    """What cupy or torch say of a tensor on the first CUDA device."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("nobody asks")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (OnGpu(), r"input_ids in memory of the CPU.*another device.*tensor\.cpu\(\)"),
        (torch.ones(1, 2, requires_grad=True), r"without gradient.*detach\(\)"),
        (torch.ones(1, 2, dtype=torch.bfloat16), r"type that numpy knows.*\.float\(\)"),
        (torch.ones(1, 2).to_sparse(), "dense tensor"),
        (torch.ones(1, 2), "whole numbers.*float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(stories: Session, given: object, words: str) -> None:
    with pytest.raises(RuntimeInputError, match=words):
        stories.run(given)  # type: ignore[arg-type]
