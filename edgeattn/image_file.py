"""Reads images that a user names: prepared arrays, as how pixels are scaled is a model's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeattn.encoder_shape import PatchInput
from edgeattn.errors import RuntimeInputError

# How the name of a file of images ends.
IMAGES = ".npy"


def read_images(file: Path, read: PatchInput) -> npt.NDArray[np.float32]:
    """Images `[N, channels, height, width]` of a .npy file, scaled as the model wants them.

    Args:
        file: of one array of floats; mapped into memory, not read whole.
        read: the images that the model reads.

    Raises:
        RuntimeInputError: it cannot be read, or holds no such array or numbers that are not finite.
    """
    wanted = (read.channels, read.height, read.width)
    sizes = f"an array [N, {', '.join(map(str, wanted))}] of floats in {file}"
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise RuntimeInputError(
            expected=f"images at {file}",
            came=f"it cannot be read ({error.strerror or 'no .npy file'})",
            todo="check the path",
        ) from error
    except (ValueError, EOFError) as error:
        raise RuntimeInputError(
            expected=sizes, came="it is no .npy file of numbers", todo="write it with numpy.save"
        ) from error
    if not isinstance(images, np.ndarray) or images.dtype.kind != "f":
        raise RuntimeInputError(
            expected=sizes, came="it holds something else", todo="write it with numpy.save"
        )
    if images.ndim != 4 or images.shape[1:] != wanted or not len(images):
        raise RuntimeInputError(
            expected=sizes,
            came=f"its size is {list(images.shape)}",
            todo="crop, resize and scale the images as the model's card says",
        )
    if not all(np.isfinite(image).all() for image in images):
        raise RuntimeInputError(
            expected=f"finite numbers in {file}", came="NaN or Inf", todo="write it again"
        )
    return images.astype(np.float32)
