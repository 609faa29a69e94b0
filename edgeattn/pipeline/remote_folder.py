"""A bundle's copy on a device: what is missing is sent, what was built is fetched, both resume.

A file is written as NAME.part and takes its name when its sha256 is right. Nothing is touched in a
folder that holds anything but a copy of this very bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeattn.bundle.bundle import MANIFEST, Bundle, hash_file
from edgeattn.bundle.manifest import FileRecord
from edgeattn.engine.record import ENGINES
from edgeattn.errors import BundleError, DeviceError
from edgeattn.pipeline.ssh import Answer, Ssh

# Exit codes of a shell that finds no command, or cannot start it.
NO_COMMAND = (126, 127)
_CHUNK = 1 << 20
_BROKEN, _DAMAGED, _NONE = 75, 76, 77

# $1: the command to need, $2: the folder; then name and size of each file. Prints the processor,
# the free bytes, whether the folder is free, and per file its size (-1: none), sha256 (-: another
# size) and the size of a part.
_LOOK = """
look() {
    size=$(stat -c %s -- "$1" 2>/dev/null) || size=-1
    part=$(stat -c %s -- "$1.part" 2>/dev/null) || part=0
    sum=-
    [ "$size" != "$2" ] || sum=$(sha256sum <"$1") || exit
    echo "$size ${sum%% *} $part"
}
cd || exit
command -v "$1" >/dev/null || exit 127
mkdir -p -- "$2" && cd -- "$2" || exit
shift 2
uname -m
df -B1 --output=avail . | tail -n 1
[ "$(ls -A)" ] && [ "$(ls -A)" != manifest.json.part ] && echo used || echo free
while [ $# -gt 0 ]; do look "$1" "$2"; shift 2; done
"""

# $1: the folder; then of each file name, bytes that are there, size and sha256. The rest of their
# contents comes on standard input, one after the other.
_SEND = f"""
cd && cd -- "$1" || exit
shift
while [ $# -gt 0 ]; do
    mkdir -p -- "$(dirname -- "$1")" || exit
    [ "$2" != 0 ] || rm -f -- "$1.part"
    head -c "$(($3 - $2))" >>"$1.part" || exit
    [ "$(stat -c %s -- "$1.part")" = "$3" ] || exit {_BROKEN}
    sum=$(sha256sum <"$1.part") || exit
    [ "${{sum%% *}}" = "$4" ] || {{ rm -f -- "$1.part"; exit {_DAMAGED}; }}
    mv -f -- "$1.part" "$1" || exit
    shift 4
done
"""

# $1: the folder, $2: a file there, $3: the first byte to read, from 1 on.
_READ = f"""
cd && cd -- "$1" || exit
[ -f "$2" ] || exit {_NONE}
exec tail -c "+$3" -- "$2"
"""


def no_edgeattn(host: str, command: str) -> DeviceError:
    """The refusal of a device without edgeattn."""
    return DeviceError(
        expected=f"the command {command} on {host}",
        came="its shell finds none",
        todo="pip install edgeattn there, or say where it is with --on-command; without Python, "
        "copy the bundle there and run its build_on_device.sh",
    )


@dataclass(frozen=True)
class _There:
    """What is known of one file on the device."""

    size: int
    sha256: str
    part: int


@dataclass(frozen=True)
class Copy:
    """What `RemoteFolder.look` found.

    Attributes:
        arch: the device's processor, as "aarch64".
        missing: files to send, and how many bytes of each are there.
        bytes: to send.
    """

    arch: str
    missing: Mapping[str, int]
    bytes: int


@dataclass(frozen=True)
class RemoteFolder:
    """The folder of a bundle on a device.

    Attributes:
        ssh: the device.
        path: of the folder, absolute or below the home folder.
        bundle: opened, here.
    """

    ssh: Ssh
    path: str
    bundle: Bundle

    def look(self, command: str) -> Copy:
        """Asks the device what it has of the bundle.

        Args:
            command: edgeattn, which it must have.

        Raises:
            DeviceError: it cannot be reached or does not answer as expected, or its disk is full.
            BundleError: the folder holds something else.
        """
        files = self._files()
        asked = [word for name, file in files.items() for word in (name, str(file.bytes))]
        answer = self.ssh.run(_LOOK, command, self.path, *asked)
        if answer.code in NO_COMMAND:
            raise no_edgeattn(self.ssh.host, command)
        if answer.code:
            raise self._failed("look at", answer)
        try:
            arch, free, state, *lines = answer.output.decode().splitlines()
            known = dict(zip(files, map(_parse, lines), strict=True))
            missing = {
                name: known[name].part if known[name].part <= file.bytes else 0
                for name, file in files.items()
                if known[name].sha256 != file.sha256
            }
            found = Copy(arch, missing, sum(files[n].bytes - at for n, at in missing.items()))
            self._require_place(int(free), found, is_used=state != "free")
        except ValueError as error:
            raise DeviceError(
                expected=f"{self.ssh.host} to say what is in {self.path}",
                came="its answer does not read",
                todo=f"let its login shell print nothing by itself: ssh {self.ssh.host} true",
            ) from error
        return found

    def _files(self) -> dict[str, FileRecord]:
        """All files of the bundle; first the manifest, by which a half-sent copy is known."""
        manifest = self.bundle.path / MANIFEST
        own = FileRecord(bytes=manifest.stat().st_size, sha256=hash_file(manifest))
        return {MANIFEST: own, **self.bundle.manifest.files}

    def _require_place(self, free: int, found: Copy, *, is_used: bool) -> None:
        host, path = self.ssh.host, self.path
        if is_used and MANIFEST in found.missing:
            raise BundleError(
                expected=f"a free folder, or a copy of this bundle, at {path} on {host}",
                came="something else is there",
                todo=f"name another one: --on {host}:FOLDER",
            )
        if free < found.bytes:
            raise DeviceError(
                expected=f"{found.bytes / 1e6:,.1f} MB of free disk at {path} on {host}",
                came=f"{free / 1e6:,.1f} MB are free",
                todo="free some space there, or name a folder on another disk: --on HOST:FOLDER",
            )

    def send(self, found: Copy, progress: Callable[[int], object]) -> None:
        """Sends what is missing.

        Args:
            found: of `look`.
            progress: called with the bytes sent since the last call.

        Raises:
            DeviceError: the connection broke, or the disk is full.
        """
        if not found.missing:
            return
        files = self._files()
        words = [
            word
            for name, offset in found.missing.items()
            for word in (name, str(offset), str(files[name].bytes), files[name].sha256)
        ]
        answer = self.ssh.run(_SEND, self.path, *words, feed=self._contents(found, progress))
        if answer.code in (_BROKEN, _DAMAGED):
            raise DeviceError(
                expected=f"the bundle to reach {self.ssh.host} whole",
                came="the transfer broke" if answer.code == _BROKEN else "a file arrived damaged",
                todo="run the same command again: it goes on where this one stopped",
            )
        if answer.code:
            raise self._failed("write to", answer)

    def _contents(self, found: Copy, progress: Callable[[int], object]) -> Iterator[bytes]:
        for name, offset in found.missing.items():
            with (self.bundle.path / name).open("rb") as file:
                file.seek(offset)
                while piece := file.read(_CHUNK):
                    yield piece
                    progress(len(piece))

    def read(self, name: str) -> bytes | None:
        """A small file of the folder of engines, None where there is none.

        Raises:
            DeviceError: the connection broke, or the file cannot be read.
        """
        answer = self.ssh.run(_READ, f"{self.path}/{ENGINES}", name, "1")
        if answer.code == _NONE:
            return None
        if answer.code:
            raise self._failed("read from", answer)
        return answer.output

    def fetch(
        self, name: str, size: int, sha256: str, draft: Path, progress: Callable[[int], object]
    ) -> None:
        """Fetches a file of the folder of engines.

        Args:
            name: plain, of the file there.
            size: of it.
            sha256: of its content.
            draft: where it goes; what a broken transfer left there is taken up.
            progress: called with the bytes fetched since the last call.

        Raises:
            DeviceError: the connection broke, or another content came.
            BundleError: this disk is full.
        """
        try:
            answer = self._append(name, size, draft, progress)
        except OSError as error:
            raise BundleError(
                expected=f"to write the engine into {draft.parent}",
                came=f"the system says: {error.strerror}",
                todo="free some space and run the same command again",
            ) from error
        if answer.code:
            raise self._failed("read from", answer)
        if hash_file(draft) == sha256:
            return
        is_short = draft.stat().st_size < size
        if not is_short:
            draft.unlink()
        raise DeviceError(
            expected=f"{name} from {self.ssh.host} with the sha256 of its record",
            came="the transfer broke" if is_short else "it has another",
            todo="run the same command again",
        )

    def _append(
        self, name: str, size: int, draft: Path, progress: Callable[[int], object]
    ) -> Answer:
        with draft.open("ab") as file:
            offset = file.tell()
            progress(offset)

            def take(piece: bytes) -> None:
                file.write(piece[: max(0, size + 1 - file.tell())])  # one more shows a wrong size
                progress(len(piece))

            folder = f"{self.path}/{ENGINES}"
            return self.ssh.run(_READ, folder, name, str(offset + 1), take=take)

    def _failed(self, what: str, answer: Answer) -> DeviceError:
        return DeviceError(
            expected=f"to {what} {self.path} on {self.ssh.host}",
            came=f"it says: {answer.said or f'exit code {answer.code}'}",
            todo="free space or choose another folder there with --on HOST:FOLDER",
        )


def _parse(line: str) -> _There:
    size, sha256, part = line.split()
    return _There(int(size), sha256, int(part))
