"""What an encoder is calibrated on: windows of a text, each as a text of its own, or images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeattn.calibration.windows import surrounding_ids, text_sha256, token_windows
from edgeattn.encoder_shape import PatchInput, TokenInput
from edgeattn.errors import RuntimeInputError
from edgeattn.image_file import read_images
from edgeattn.text_file import read_text


def encoder_text_windows(
    file: Path,
    tokenizer_json: bytes | None,
    read: TokenInput,
    *,
    windows: int,
    length: int,
) -> tuple[Tensor, dict[str, Any]]:
    """Windows of a text with the special tokens around each that every text gets, and notes.

    Args:
        file: the text, or a folder of them.
        tokenizer_json: content of tokenizer.json, None for a checkpoint without.
        read: how the encoder reads texts.
        windows: how many.
        length: tokens of each, the special ones among them; no padding.

    Returns:
        Token ids `[windows, length]`, and JSON-ready values that tell what they are.

    Raises:
        EdgeattnError: the text or the tokenizer does not do, see `token_windows`.
    """
    text = read_text(file)
    before, after = surrounding_ids(tokenizer_json)
    inner = token_windows(
        text,
        tokenizer_json,
        windows=windows,
        length=length - len(before) - len(after),
        vocab_size=read.vocab_size,
    )
    first, last = (
        torch.tensor(ids, dtype=torch.int64).expand(windows, -1) for ids in (before, after)
    )
    found = torch.cat((first, inner, last), dim=1)
    about = {"text": file.name, "text_sha256": text_sha256(text)}
    return found, {**about, "windows": windows, "length": length}


def image_windows(file: Path, read: PatchInput, *, windows: int) -> tuple[Tensor, dict[str, Any]]:
    """The first images of a .npy file, and notes.

    Args:
        file: see `read_images`.
        read: how the encoder reads images.
        windows: how many at most.

    Returns:
        Pixels `[N, C, height, width]`, and JSON-ready values that tell what they are.

    Raises:
        RuntimeInputError: the file does not do, or holds fewer.
    """
    images = read_images(file, read)
    if len(images) < windows:
        raise RuntimeInputError(
            expected=f"{windows} images in {file}",
            came=f"there are {len(images)}",
            todo=f"pass more or --calibration-windows {len(images)}",
        )
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    about = {"images": file.name, "images_sha256": digest, "windows": windows}
    return torch.from_numpy(images[:windows]), {**about, "length": read.tokens}
