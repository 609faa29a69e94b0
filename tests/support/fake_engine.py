"""Engines that tests/support/fake_tensorrt runs, with true records, and its machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeattn.bundle.bundle import Bundle, hash_file
from edgeattn.engine.profiles import AnyProfile, DecoderProfile, Range, input_shapes
from edgeattn.engine.record import ENGINES, Engine, EngineRecord

SM = 80
VERSION = "11.1.0"
_MAIN = "from edgeattn.cli import main; main()"
GPU = "NVIDIA A100-SXM4-80GB"
RUNTIME = Path(__file__).parent / "fake_tensorrt"
PROFILES = (
    DecoderProfile("prefill", Range(1, 1, 2), Range(1, 64, 64), Range(0, 0, 64)),
    DecoderProfile("decode", Range(1, 1, 2), Range(1, 1, 1), Range(0, 64, 127)),
)


def write_engine(
    bundle: Path, profiles: Sequence[AnyProfile] = PROFILES, *, record: Any = None, **told: Any
) -> Engine:
    """Writes an engine of a bundle and its record.

    Args:
        bundle: its folder.
        profiles: it is "built" for.
        record: fields of the record to replace.
        told: what the fake runtime reads, for one what goes wrong.
    """
    opened = Bundle.open(bundle)
    model = opened.model_file.resolve()
    shapes = [input_shapes(model, profile) for profile in profiles]
    path = bundle / ENGINES / f"tensorrt-{VERSION}-sm{SM}.engine"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"model": str(model), "profiles": shapes, **told}))
    fields = {
        "schema_version": 1,
        "edgeattn": "0",
        "engine": path.name,
        "bytes": path.stat().st_size,
        "sha256": hash_file(path),
        "model_sha256": opened.manifest.files["model.onnx"].sha256,
        "targets": (opened.manifest.target.name,),
        "flavour": "tensorrt",
        "tensorrt": VERSION,
        "sms": (SM,),
        "arch": platform.machine(),
        "gpu": GPU,
        "driver": "13.2",
        "plugins": None,
        "profiles": {profile.name: profile.to_dict() for profile in profiles},
        "stripped": bool(told.get("stripped")),
        "layers": 1,
        "layer_source": "engine inspector",
        "layer_list": (),
        "seconds": {"parse": 0.0, "build": 0.0},
        "peak_rss_mb": None,
    }
    engine = Engine(path, EngineRecord(**{**fields, **(record or {})}))
    path.with_name(f"{path.name}.json").write_text(engine.record.to_json())
    return engine


def device_environment(cuda: Path, **settings: object) -> dict[str, str]:
    """The environment of a process on a machine with a GPU and TensorRT, both fake.

    Args:
        cuda: folder of the fake libcuda.
        settings: of it, as SM or MOST.
    """
    settings = {"NAME": GPU, "SM": SM, "MEMORY": 80_000_000_000, **settings}
    paths = [str(RUNTIME), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(cuda),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        **{f"FAKE_CUDA_{name}": str(value) for name, value in settings.items()},
    }


def edgeattn_there(cuda: Path, *arguments: object, **settings: object) -> Any:
    """Runs the command line on that machine; what `subprocess.run` gives."""
    return subprocess.run(
        [sys.executable, "-c", _MAIN, *map(str, arguments)],
        env=device_environment(cuda, **settings),
        capture_output=True,
        text=True,
        check=False,
    )
