"""A machine reached by the user's own ssh: sh scripts run there, bytes go in and come out.

Nothing but sh and coreutils is needed on the other side. Data reach a script as its arguments, each
quoted, so that no name can become a command.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edgeattn.errors import DeviceError, MissingDependencyError, UsageError

_CHUNK = 1 << 20
# ssh's own exit code; any other is that of the command.
_SSH_FAILED = 255
_OPTIONS = (
    "-T",  # no terminal: it would mix the streams
    *("-o", "BatchMode=yes"),  # never waits for a password
    *("-o", "RemoteCommand=none"),  # a host's own one would refuse ours
    *("-o", "ServerAliveInterval=15"),  # else a dead line is never noticed
)
_URL = re.compile(r"(?P<host>ssh://[^/]+)(?:/(?P<folder>.*))?")
_SCP = re.compile(r"(?P<host>(?:[^@:/]+@)?(?:\[[^\]]+\]|[^@:/\[\]]+))(?::(?P<folder>.*))?")

# The command ends when this side hangs up: its standard input is then at its end, and the whole
# process group, which sshd starts for each session, gets what Ctrl-C sends.
_WATCHED = """
cd || exit
exec 3<&0
(cat <&3; kill -INT 0) >/dev/null 2>&1 &
exec 3<&- "$@" </dev/null
"""


@dataclass(frozen=True)
class Address:
    """Where a device is.

    Attributes:
        host: as ssh takes it: [USER@]HOST, or ssh://[USER@]HOST[:PORT].
        folder: of the user's choice there, absolute or below the home folder; None for none.
    """

    host: str
    folder: str | None


def parse_address(text: str) -> Address:
    """Reads [USER@]HOST[:FOLDER] or ssh://[USER@]HOST[:PORT][/FOLDER].

    Raises:
        UsageError: it is neither, or ssh would take it for an option.
    """
    match = (_URL if text.startswith("ssh://") else _SCP).fullmatch(text)
    host = match["host"] if match else ""
    user_and_name = host.removeprefix("ssh://").split("@")
    odd = not text.isprintable() or " " in host
    if not host or odd or any(part[:1] in ("", "-") for part in user_and_name):
        raise UsageError(
            expected="--on [USER@]HOST[:FOLDER] or ssh://[USER@]HOST[:PORT][/FOLDER]",
            came=f"'{text}' was given",
            todo="write for example --on jetson@192.168.55.1, or a name of your ~/.ssh/config",
        )
    assert match is not None
    folder = match["folder"]
    if folder and host.startswith("ssh://") and not folder.startswith("~"):
        folder = f"/{folder}"
    if folder:
        folder = folder.removeprefix("~/").rstrip("/") or "/"
    return Address(
        host if host.startswith("ssh://") else re.sub(r"[\[\]]", "", host), folder or None
    )


@dataclass(frozen=True)
class Answer:
    """How a command on the device ended.

    Attributes:
        code: its exit code.
        output: its standard output, where nothing else took it.
        said: the last line of its standard error.
    """

    code: int
    output: bytes
    said: str


@dataclass(frozen=True)
class Ssh:
    """One machine.

    Attributes:
        host: see `Address`.
    """

    host: str

    def run(
        self,
        script: str,
        *arguments: str,
        feed: Iterable[bytes] = (),
        take: Callable[[bytes], object] | None = None,
    ) -> Answer:
        """Runs an sh script there.

        Args:
            script: of sh and coreutils; begins in any folder.
            arguments: its $1, $2 and so on.
            feed: its standard input.
            take: called with its standard output piece by piece, instead of collecting it.

        Raises:
            DeviceError: no connection, or it broke.
            MissingDependencyError: there is no ssh here.
        """
        return self._run(script, arguments, feed, take, watched=False)

    def run_watched(self, *command: str) -> Answer:
        """Runs a command there, from the home folder; it is interrupted where this side leaves.

        Raises:
            DeviceError: no connection, or it broke.
            MissingDependencyError: there is no ssh here.
        """
        return self._run(_WATCHED, command, (), None, watched=True)

    def _run(
        self,
        script: str,
        arguments: Iterable[str],
        feed: Iterable[bytes],
        take: Callable[[bytes], object] | None,
        *,
        watched: bool,
    ) -> Answer:
        # One quoted command: whatever the login shell is, sh reads the script.
        there = shlex.join(["exec", "sh", "-c", script, "edgeattn", *arguments])
        output: list[bytes] = []
        with tempfile.TemporaryFile() as errors:
            try:
                ssh = subprocess.Popen(
                    ["ssh", *_OPTIONS, "--", self.host, there],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                )
            except FileNotFoundError as error:
                raise MissingDependencyError(
                    expected="ssh, to reach the device",
                    came="it is not installed here",
                    todo="install OpenSSH's client (Debian: apt install openssh-client)",
                ) from error
            with ssh:
                try:
                    _exchange(ssh, feed, take or output.append, hang_up=not watched)
                    code = ssh.wait()
                except BaseException:
                    ssh.kill()  # Ctrl-C above all: the other side notices
                    raise
                finally:
                    _close(ssh)
            errors.seek(0)
            said = _last_line(errors.read())
        if code == _SSH_FAILED:
            raise _no_connection(self.host, said)
        return Answer(code, b"".join(output), said)


def _exchange(
    ssh: subprocess.Popen[bytes],
    feed: Iterable[bytes],
    take: Callable[[bytes], object],
    *,
    hang_up: bool,
) -> None:
    assert ssh.stdin is not None
    assert ssh.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it ended early, its exit code says why
        for piece in feed:
            ssh.stdin.write(piece)
        ssh.stdin.flush()
    if hang_up:
        _close(ssh)
    while piece := ssh.stdout.read(_CHUNK):
        take(piece)


def _close(ssh: subprocess.Popen[bytes]) -> None:
    assert ssh.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        ssh.stdin.close()


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").split("\n")
    printable = ["".join(c for c in line if c.isprintable()).strip() for line in lines]
    return next(filter(None, reversed(printable)), "")


def _no_connection(host: str, said: str) -> DeviceError:
    todo = f"check that this works: ssh {host} true; the same command then goes on where it was"
    if "ermission denied" in said:
        todo = (
            f"set up a key or an agent, for no password can be asked for here: ssh-copy-id {host}"
        )
    elif "ost key" in said:
        todo = f"connect once by hand and check the device's key: ssh {host}"
    return DeviceError(
        expected=f"a connection to {host}", came=f"ssh says: {said or 'nothing'}", todo=todo
    )
