"""The folder in which a corpus's bytes become a manifest and an engine's record.

`plugins/runtime/test/fuzz_readers.cpp` makes the same one.
"""

from __future__ import annotations

from pathlib import Path

CONTENTS = {"model.onnx": b"a graph", "golden/decoder.npz": b"golden"}
LINK = "link"
ENGINE = "made.engine"
RECORD = f"{ENGINE}.json"


def write_folder(root: Path) -> None:
    """What the corpus's manifests list, and a link that leads elsewhere."""
    for name, content in CONTENTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / LINK).symlink_to("model.onnx")
