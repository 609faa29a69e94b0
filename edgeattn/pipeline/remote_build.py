"""`build --on`: the bundle goes to the device, is built there, and the engine comes back.

What the device answers is data of another machine: names, hashes and the record are checked against
the bundle before a file is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeattn.bundle.bundle import MANIFEST, MODEL, Bundle, hash_file
from edgeattn.engine.folder import alone, place
from edgeattn.engine.record import ENGINES, Engine, EngineRecord
from edgeattn.errors import DeviceError, EdgeattnError, LoweringError, UsageError
from edgeattn.pipeline.build import Built, check_for_device
from edgeattn.pipeline.build_plan import BuildRequest
from edgeattn.pipeline.clock import Progress
from edgeattn.pipeline.remote_folder import NO_COMMAND, RemoteFolder, no_edgeattn
from edgeattn.pipeline.ssh import Answer, Ssh, parse_address

COPIES = ".cache/edgeattn/bundles"  # below the home folder of the device
_ENGINE_NAME = re.compile(r"\w[\w.+-]*\.engine")
_FETCHED = ".fetched-"


def build_on(
    where: str,
    path: Path,
    request: BuildRequest,
    *,
    command: str = "edgeattn",
    progress: Progress | None = None,
) -> Built:
    """Builds an engine on a device over ssh, and brings it and its record here.

    Args:
        where: [USER@]HOST[:FOLDER]; without a folder the bundle is copied below `COPIES`.
        path: the bundle, here.
        request: how; a timing cache is a file of the device.
        command: edgeattn there, if its shell does not find it by name.
        progress: called with (stage, done, total).

    Raises:
        EdgeattnError: a refusal, of this machine or of the device.
    """
    address = parse_address(where)
    bundle, arch = check_for_device(path, request, progress=progress)
    ssh = Ssh(address.host)
    folder = RemoteFolder(ssh, address.folder or _default_folder(bundle), bundle)
    tell = progress or (lambda stage, done, total: None)
    tell(f"looking at {ssh.host}", 0, 1)
    found = folder.look(command)
    if found.arch != arch:
        raise LoweringError(
            expected=f"a device with {arch}, as {bundle.manifest.target.name} has",
            came=f"{ssh.host} has {found.arch}",
            todo="name the right device, or export the bundle for this one",
        )
    folder.send(found, _counter(tell, f"sending to {ssh.host}", found.bytes))
    tell(f"building on {ssh.host}", 0, 1)
    answer = ssh.run_watched(command, "build", "--json", *_options(request), "--", folder.path)
    if answer.code in NO_COMMAND:
        raise no_edgeattn(ssh.host, command)
    return _bring(folder, _read_answer(answer, ssh.host), tell)


def _default_folder(bundle: Bundle) -> str:
    digest = hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", bundle.path.resolve().name)
    return f"{COPIES}/{name}-{digest[:12]}"


def _counter(tell: Progress, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        tell(stage, done, total)

    return count


def _options(request: BuildRequest) -> list[str]:
    """The request as it is written on a command line."""
    words = [word for target in request.targets for word in ("--target", target)]
    words += ["--flavour", request.flavour] if request.flavour is not None else []
    words += [word for profile in request.profiles for word in ("--profile", profile)]
    words += ["--timing-cache", str(request.timing_cache)] if request.timing_cache else []
    words += ["--strip-weights"] if request.strip_weights else []
    words += ["--jobs", str(request.jobs)] if request.jobs is not None else []
    words += ["--force"] if request.force else []
    return words


def _read_answer(answer: Answer, host: str) -> dict[str, Any]:
    """The JSON object edgeattn printed there.

    Raises:
        EdgeattnError: its refusal, or that it printed none.
    """
    try:
        told = json.loads(answer.output)
    except ValueError:
        told = None
    if not isinstance(told, dict) or (answer.code and "error" not in told):
        raise DeviceError(
            expected=f"edgeattn build on {host} to tell its outcome",
            came=f"it ended with exit code {answer.code}: {answer.said or 'it says nothing'}",
            todo=f"look there: ssh {host} edgeattn build --help",
        )
    if answer.code:
        raise _refusal(str(told.pop("error")), answer.code, host, told)
    return told


def _refusal(sentence: str, code: int, host: str, details: dict[str, Any]) -> EdgeattnError:
    """The device's own sentence, and that it is the device's."""
    expected, found, rest = sentence.removeprefix("expected ").partition(", but ")
    came, _, todo = rest.rpartition(": ")
    kind = UsageError if code == UsageError.exit_code else LoweringError
    if not found or not came:
        expected, came, todo = "an engine", sentence, "correct that on the device"
    return kind(expected=expected, came=f"on {host}: {came}", todo=todo, details=details)


def _bring(folder: RemoteFolder, told: dict[str, Any], tell: Progress) -> Built:
    """The engine that was built, with its record, here."""
    host, bundle = folder.ssh.host, folder.bundle
    name = told.get("engine")
    if not isinstance(name, str) or not _ENGINE_NAME.fullmatch(name):
        raise _odd(host, f"names the engine {name!r}")
    record = _record(folder, name)
    with alone(bundle.path / ENGINES) as engines:
        engine = Engine(engines / name, record)
        if not _is_here(engine):
            # by its content: an engine that is built anew is another one
            draft = engines / f"{_FETCHED}{record.sha256[:16]}"
            count = _counter(tell, "fetching the engine", record.bytes)
            folder.fetch(name, record.bytes, record.sha256, draft, count)
            place(engine, draft)
            for leftover in engines.glob(f"{_FETCHED}*"):
                leftover.unlink()
        selftest = folder.read(engine.selftest_file.name)
        if selftest is not None:
            engine.selftest_file.write_text(_tidy(selftest, host), encoding="utf-8")
    return Built(engine, was_there=told.get("was_there") is True)


def _record(folder: RemoteFolder, name: str) -> EngineRecord:
    host, bundle = folder.ssh.host, folder.bundle
    try:
        record = EngineRecord.model_validate_json(folder.read(f"{name}.json") or b"")
    except ValidationError as error:
        raise _odd(host, f"has no record of {name} that reads") from error
    if (record.engine, record.model_sha256) != (name, bundle.manifest.files[MODEL].sha256):
        raise _odd(host, f"has a record of {name} that is about another engine or graph")
    library = record.plugins
    if library is not None:
        listed = bundle.manifest.files.get(library.file)
        if listed is None or listed.sha256 != library.sha256:
            raise _odd(host, f"has a record of {name} with a plugin library that is not ours")
    return record


def _is_here(engine: Engine) -> bool:
    written = engine.path.with_name(f"{engine.path.name}.json")
    return (
        engine.path.is_file()
        and written.is_file()
        and written.read_text(encoding="utf-8") == engine.record.to_json()
        and hash_file(engine.path) == engine.record.sha256
    )


def _tidy(content: bytes, host: str) -> str:
    try:
        return json.dumps(json.loads(content), indent=2) + "\n"
    except ValueError as error:
        raise _odd(host, "has a self-test whose outcome does not read") from error


def _odd(host: str, what: str) -> DeviceError:
    return DeviceError(
        expected=f"{host} to tell of an engine it built",
        came=f"it {what}",
        todo="let it run the same version of edgeattn as this machine",
    )
