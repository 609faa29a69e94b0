"""Files that read as plugin libraries, without code."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from edgeattn.engine.embed_cubins import TABLE_MARKER
from edgeattn.engine.plugins import PLUGIN_ABI

MACHINES = {"x86_64": 62, "aarch64": 183}
KERNELS = {
    "decode": {"BLOCK": 64, "BLOCK_V": 64},
    "prepare": {"BLOCK": 64, "CHANNELS": 0, "CHUNK": 64},
    "states": {"BLOCK": 64, "CHANNELS": 0, "CHUNK": 64},
    "outputs": {"BLOCK": 64, "CHANNELS": 0, "CHUNK": 64},
}


def table(**changed: object) -> dict[str, Any]:
    variants = [
        {"kernel": f"recurrent_linear_attention.{n}", "dtype": "fp16", "constants": c, "sm": sm}
        for n, c in KERNELS.items()
        for sm in (80, 87)
    ]
    facts = {
        "abi": PLUGIN_ABI,
        "arch": "aarch64",
        "tensorrt_headers": "10.14",
        "triton": "3.7.1",
        "kernels_sha256": "0" * 64,
        "ops": ["RecurrentLinearAttention"],
        "variants": variants,
    }
    return {**facts, **changed}


def library_file(folder: Path, content: dict[str, Any], *, machine: str = "aarch64") -> Path:
    """The bytes of a library as far as they are read."""
    head = b"\x7fELF" + bytes(14) + struct.pack("<H", MACHINES[machine]) + bytes(100)
    file = folder / "libedgeattn_plugins.so"
    text = f"\0{TABLE_MARKER}{json.dumps(content)}\0"
    file.write_bytes(head + text.encode() + bytes(50))
    return file
