"""A bundle is whole or absent, whatever ends the writing of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgeattn.bundle.writer import BundleWriter, open_writer
from edgeattn.errors import BundleError


def write(final: Path, content: str = "{}", *, force: bool = False) -> None:
    """A thing that looks like a bundle."""
    with open_writer(final, force=force) as writer:
        writer.write("manifest.json", content)
        writer.write("golden/a.npz", b"\0" * 100)
        writer.commit()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_committed(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "bundle")
    assert names(tmp_path / "deep") == ["bundle"]
    assert names(tmp_path / "deep" / "bundle") == ["golden", "manifest.json"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "manifest.json").is_file()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type, existing: bool) -> None:
    if existing:
        write(tmp_path / "bundle", "old")

    def fail() -> None:
        with open_writer(tmp_path / "bundle", force=existing) as writer:
            writer.write("manifest.json", "new")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == (["bundle"] if existing else [])
    if existing:
        assert (tmp_path / "bundle" / "manifest.json").read_text() == "old"


def test_not_committed_is_absent(tmp_path: Path) -> None:
    with open_writer(tmp_path / "bundle") as writer:
        writer.write("manifest.json", "{}")
    assert names(tmp_path) == []


def test_interrupted_between_the_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old bundle was moved aside and comes back at once."""
    write(tmp_path / "bundle", "old")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".edgeattn-unfinished"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "bundle", "new", force=True)
    assert names(tmp_path) == ["bundle"]
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "old"


def test_force_replaces_a_bundle(tmp_path: Path) -> None:
    write(tmp_path / "bundle", "old")
    with pytest.raises(BundleError, match=r"already there.*--force"):
        write(tmp_path / "bundle", "new")
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "old"
    write(tmp_path / "bundle", "new", force=True)
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "new"
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    "kind", ["folder", "file", "link to a folder", "link to a bundle", "dead link"]
)
@pytest.mark.parametrize("force", [False, True])
def test_only_a_bundle_is_ever_replaced(tmp_path: Path, kind: str, force: bool) -> None:
    final, other = tmp_path / "bundle", tmp_path / "other"
    other.mkdir()
    if kind == "folder":
        final.mkdir()
        (final / "thesis.tex").write_text("ten years of work")
    elif kind == "file":
        final.write_text("ten years of work")
    elif kind == "dead link":
        final.symlink_to(tmp_path / "absent")
    else:
        if kind == "link to a bundle":
            (other / "manifest.json").write_text("{}")
        final.symlink_to(other)
    before = names(tmp_path)
    with pytest.raises(BundleError, match="choose another folder"):
        write(final, force=force)
    assert names(tmp_path) == before
    if kind == "folder":
        assert (final / "thesis.tex").read_text() == "ten years of work"


@pytest.mark.parametrize("place", ["/", "..", "a-file/bundle", "x" * 300])
def test_a_place_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a-file").write_text("")
    monkeypatch.chdir(folder)
    with pytest.raises(BundleError, match="choose another folder"):
        write(Path(place), force=True)
    assert names(folder) == ["a-file"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(self: BundleWriter, name: str, content: bytes | str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(BundleWriter, "write", full)
    with pytest.raises(BundleError, match=f"{os.strerror(code)}.*free some space"):
        write(tmp_path / "bundle")
    assert names(tmp_path) == []


def test_other_errors_are_not_blamed_on_the_disk(tmp_path: Path) -> None:
    def fail() -> None:
        with open_writer(tmp_path / "bundle"):
            raise FileNotFoundError(errno.ENOENT, "no such file")

    with pytest.raises(FileNotFoundError):
        fail()
    assert names(tmp_path) == []


CHILD = """
import os, signal, sys
from pathlib import Path
from edgeattn.bundle.writer import open_writer

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

with open_writer(Path(sys.argv[1]), force=True) as writer:
    writer.write("manifest.json", "new")
    if sys.argv[2] == "writing":
        die()
    rename = Path.rename
    if sys.argv[2] == "between":
        ends = lambda path: path.name.endswith(".edgeattn-unfinished")
        Path.rename = lambda self, to: die() if ends(self) else rename(self, to)
    if sys.argv[2] == "renamed":
        Path.unlink = die
    writer.commit()
"""


def killed(final: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, final, when], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("when", ["writing", "between", "renamed"])
@pytest.mark.parametrize("name", ["bundle", "a[b]*?", "-"])
def test_after_a_kill(tmp_path: Path, name: str, when: str, existing: bool) -> None:
    """The next export removes what is left and brings back what was moved aside."""
    final = tmp_path / name
    if existing:
        write(final, "old")
    killed(final, when)
    if final.exists():
        content = (final / "manifest.json").read_text()
        assert content == ("new" if when == "renamed" else "old")
    with open_writer(tmp_path / name, force=True):
        pass
    whole = existing or when == "renamed"
    assert names(tmp_path) == ([name] if whole else [])
    if whole:
        found = (final / "manifest.json").read_text()
        assert found == ("new" if when == "renamed" else "old")


def test_another_running_export_is_left_alone(tmp_path: Path) -> None:
    with open_writer(tmp_path / "bundle") as first:
        first.write("manifest.json", "first")
        running = tmp_path / f".bundle.{os.getpid()}.edgeattn-unfinished"
        renamed = running.rename(tmp_path / ".bundle.1.edgeattn-unfinished")
        with open_writer(tmp_path / "bundle") as second:
            second.write("manifest.json", "second")
            second.commit()
        assert (renamed / "manifest.json").read_text() == "first"
        renamed.rename(running)
    assert names(tmp_path) == ["bundle"]
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "second"


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_kept(tmp_path: Path, force: bool) -> None:
    def race() -> None:
        with open_writer(tmp_path / "bundle", force=force) as writer:
            writer.write("manifest.json", "{}")
            (tmp_path / "bundle").mkdir()
            (tmp_path / "bundle" / "data.txt").write_text("precious")
            writer.commit()

    with pytest.raises(BundleError, match="something that is no bundle is there"):
        race()
    assert names(tmp_path) == ["bundle"]
    assert (tmp_path / "bundle" / "data.txt").read_text() == "precious"


def test_two_exports_to_one_place_do_not_replace_each_other(tmp_path: Path) -> None:
    def race() -> None:
        with open_writer(tmp_path / "bundle") as writer:
            writer.write("manifest.json", "second")
            write(tmp_path / "elsewhere", "first")
            (tmp_path / "elsewhere").rename(tmp_path / "bundle")
            writer.commit()

    with pytest.raises(BundleError, match="a bundle is already there"):
        race()
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "first"


@pytest.mark.parametrize("name", [".bundle.old", ".bundle.notes.tmp", ".bundle.edgeattn-replaced"])
def test_folders_of_others_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("precious")
    write(tmp_path / "bundle")
    assert names(tmp_path) == [name, "bundle"]
    assert (tmp_path / name / "mine.txt").read_text() == "precious"
