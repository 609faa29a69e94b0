"""The C++ session of an encoder gives what Python's gives, on the fakes of `test_session`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from cpp_session import CppSession
from encoders import save_encoder
from fake_engine import write_engine

from edgeattn.engine.profiles import EncoderProfile, Range
from edgeattn.pipeline import export
from edgeattn.recipe import Recipe
from edgeattn.runtime import EncoderSession

INPUT, BUNDLE = 4, 3


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_as_in_python(
    name: str, cpp: Callable[..., CppSession], tensorrt: str, tmp_path: Path
) -> None:
    save_encoder(name, tmp_path / "model")
    path = tmp_path / "bundle"
    export(tmp_path / "model", Recipe("a100", batch=3), path, verify=False)
    tokens = None if name == "vit" else Range(1, 10, 40)
    write_engine(
        path, [EncoderProfile("any", Range(1, 3, 3), tokens)], record={"tensorrt": tensorrt}
    )
    plain = EncoderSession.open(path)
    with cpp() as session:
        for _ in range(3):
            if name == "vit":
                read = plain.shape.input
                pixels = np.random.default_rng(0).normal(
                    size=(2, read.channels, read.height, read.width)
                )
                expected, real = plain.run_images(pixels), ...
                asked = {"pixels": pixels.ravel().tolist()}
            else:
                ids, mask = np.arange(12).reshape(2, 6), np.array([[1] * 6, [1] * 2 + [0] * 4])
                expected, real = plain.run(ids, attention_mask=mask), mask > 0
                asked = {"tokens": ids.ravel().tolist(), "mask": mask.ravel().tolist()}
            found = session.get("encode", bundle=str(path), rows=2, **asked)
            values = np.reshape(np.array(found["values"], np.float32), found["shape"])
            np.testing.assert_allclose(values[real], expected[real], rtol=0, atol=1e-5)
        wrong = {"pixels": [0.0] * 4} if name == "bert" else {"tokens": [5, 6]}
        found = session.ask("encode", bundle=str(path), rows=2, **wrong)
        assert (found["code"], "an encoder of" in found["error"]) == (INPUT, True)
        session.get("close")
        found = session.ask("open", bundle=str(path))
        assert (found["code"], "it is an encoder" in found["error"]) == (BUNDLE, True)
