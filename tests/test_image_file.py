"""Images from .npy files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeattn.encoder_shape import PatchInput
from edgeattn.errors import RuntimeInputError
from edgeattn.image_file import read_images

READ = PatchInput(height=6, width=4, patch=2)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_images_are_read(tmp_path: Path, dtype: str) -> None:
    images = np.random.default_rng(0).normal(size=(3, 3, 6, 4)).astype(dtype)
    np.save(tmp_path / "images.npy", images)
    found = read_images(tmp_path / "images.npy", READ)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, images.astype(np.float32))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((3, 3, 4, 6), np.float32), r"its size is \[3, 3, 4, 6\]"),
        (np.zeros((3, 6, 4), np.float32), "its size"),
        (np.zeros((0, 3, 6, 4), np.float32), "its size"),
        (np.zeros((1, 3, 6, 4), np.uint8), "something else"),
        (np.full((1, 3, 6, 4), np.nan), "NaN or Inf"),
        (np.array([{"a": 1}], dtype=object), "no .npy file of numbers"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, images: Any, said: str) -> None:
    np.save(tmp_path / "images.npy", images, allow_pickle=True)
    with pytest.raises(RuntimeInputError, match=said):
        read_images(tmp_path / "images.npy", READ)


@pytest.mark.parametrize("content", [None, b"", b"a text", b"\x93NUMPY\x01\x00v\x00{'descr'"])
def test_other_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "images.npy").write_bytes(content)
    with pytest.raises(RuntimeInputError):
        read_images(tmp_path / "images.npy", READ)


def test_an_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", np.zeros((1, 3, 6, 4)))
    with pytest.raises(RuntimeInputError, match="something else"):
        read_images(tmp_path / "images.npz", READ)
