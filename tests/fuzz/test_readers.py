"""Whatever bytes a bundle's readers are given, they read them or refuse in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_folder import ENGINE, RECORD, write_folder

from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.record import read_engine
from edgeattn.errors import EdgeattnError

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
ACCEPTED_MANIFESTS = {
    "manifest.json",
    "manifest_encoder.json",
    "manifest_no_quality.json",
    "manifest_older.json",
    "manifest_big_integer.json",
    "manifest_twice.json",
    "manifest_file_twice.json",
    "manifest_nested.json",
}
ACCEPTED_RECORDS = {"record.json", "record_plugins.json", "record_sms_many.json"}


def accepts(read: Callable[[], object]) -> bool:
    try:
        read()
    except EdgeattnError:
        return False
    return True


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_every_file_is_read_or_refused(file: Path, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "manifest.json").write_bytes(file.read_bytes())
    (tmp_path / RECORD).write_bytes(file.read_bytes())
    assert accepts(lambda: Bundle.open(tmp_path)) == (file.name in ACCEPTED_MANIFESTS)
    assert accepts(lambda: read_engine(tmp_path / ENGINE)) == (file.name in ACCEPTED_RECORDS)
    accepts(lambda: Bundle.open(tmp_path).any_shape)
