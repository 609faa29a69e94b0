"""Golden vectors: what is saved is loaded, what is damaged is refused in a sentence."""

from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeattn.errors import BundleError
from edgeattn.verify.cases import build_cases
from edgeattn.verify.golden import Golden


@pytest.fixture(scope="module")
def golden() -> Golden:
    rng = np.random.default_rng(0)
    names = ("sequence.0.logits", "ragged.present.0.key", "sequence.0.hidden.1")
    expected = {name: rng.standard_normal((4, 6)).astype(np.float32) for name in names}
    return Golden(build_cases(16, 64), expected, {name: 1e-3 for name in names})


@pytest.fixture(scope="module")
def content(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("golden") / "golden" / "decoder.npz"
    golden.save(file)
    return file.read_bytes()


def load(content: bytes, folder: Path) -> Golden:
    file = folder / "decoder.npz"
    file.write_bytes(content)
    return Golden.load(file)


def test_round_trip(golden: Golden, content: bytes, tmp_path: Path) -> None:
    found = load(content, tmp_path)
    assert [c.name for c in found.cases] == [c.name for c in golden.cases]
    for mine, theirs in zip(found.cases, golden.cases, strict=True):
        for left, right in zip(mine.steps, theirs.steps, strict=True):
            for field in "input_ids", "attention_mask", "position_ids":
                value = getattr(left, field)
                np.testing.assert_array_equal(value, getattr(right, field))
                assert value.dtype == np.int64
    assert found.expected.keys() == golden.expected.keys()
    for name, value in golden.expected.items():
        np.testing.assert_array_equal(found.expected[name], value)
    assert found.low_precision_error == golden.low_precision_error


def test_no_pickle_is_written(content: bytes) -> None:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        assert all(arrays[name].dtype.kind in "fiU" for name in arrays.files)


class Trap:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was run')",)


def without(content: bytes, wanted: str, **arrays: np.ndarray) -> bytes:
    """The archive without the members whose name holds `wanted`, and with other arrays."""
    with np.load(io.BytesIO(content)) as held:
        kept = {name: held[name] for name in held.files if wanted not in name}
    buffer = io.BytesIO()
    np.savez(buffer, **{**kept, **arrays})
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def renamed(content: bytes) -> bytes:
    """A zip whose members are no arrays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("expected/a.npy", content[:40])
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"PK",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: npy(np.ones(3)),
        lambda content: without(content, "", trap=np.array([Trap()], dtype=object)),
        lambda content: without(content, "low_precision_error/names"),
        lambda content: without(content, "position_ids"),
        lambda content: without(content, "sequence/0"),
        lambda content: without(content, "expected"),
        lambda content: without(content, "input"),
        lambda content: without(content, "", **{"input/a": np.ones(3)}),
        lambda content: without(content, "", **{"expected/a": np.array(["text"])}),
        renamed,
    ],
)
def test_a_damaged_file_is_refused(damage, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="golden vectors in"):
        load(damage(content), tmp_path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_never_give_another_error(
    data: st.DataObject, content: bytes, tmp_path: Path
) -> None:
    changed = bytearray(content)
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for place, byte in data.draw(st.lists(places, min_size=1, max_size=4)):
        changed[place] = byte
    with contextlib.suppress(BundleError):
        load(bytes(changed), tmp_path)
