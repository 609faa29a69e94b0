"""`build --on`, against a real sshd on this machine that plays an A100 without a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from processes import is_alive, wait_until

from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.build import BuildReport
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.record import read_engines
from edgeattn.errors import DeviceError, EdgeattnError, LoweringError, UsageError
from edgeattn.pipeline import build as build_module
from edgeattn.pipeline.build import Built
from edgeattn.pipeline.build_plan import BuildPlan, BuildRequest
from edgeattn.pipeline.remote_build import COPIES, build_on
from edgeattn.pipeline.ssh import parse_address

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="needs OpenSSH's sshd and ssh"
)
needs_rtx = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)
SHIM = "from edgeattn.cli import main; main()"
SERVER = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv HOME={folder}/home
"""
CLIENT = """
Host *
  IdentityFile {key}
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {known}
  GlobalKnownHostsFile /dev/null
"""


@dataclass
class Device:
    """The machine behind sshd.

    Attributes:
        folder: keys, configurations and the home folder.
        port: of sshd.
        edgeattn: the command there.
    """

    folder: Path
    port: int
    edgeattn: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def host(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    def client(self, *, key: str = "key", known: str = "known_hosts") -> None:
        """Writes the client's configuration."""
        text = CLIENT.format(key=self.folder / key, known=self.folder / known)
        (self.folder / "client").write_text(text)

    def command(self, text: str) -> str:
        """A command there that does what the lines say."""
        path = self.folder / f"command-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    def copy(self, bundle: Path) -> Path:
        """The copy of a bundle there."""
        digest = sha256(bundle / "manifest.json")[:12]
        (path,) = (self.home / COPIES).glob(f"*-{digest}")
        return path


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, fake_cuda: Path) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("device")
    for name in ("host_key", "key", "other"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
        subprocess.run(command, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "home").mkdir()
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "server").write_text(SERVER.format(port=port, folder=folder))
    found = Device(folder, port, folder / "edgeattn")
    found.edgeattn.write_text(_edgeattn(folder, fake_cuda))
    found.edgeattn.chmod(0o755)
    (folder / "settings").touch()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, a service manager would make it
    with (folder / "log").open("w") as log:
        command = [SSHD, "-D", "-e", "-f", folder / "server"]
        server = subprocess.Popen(command, stderr=log)
    try:
        wait_until(lambda: _listens(port) or server.poll() is not None)
        if server.poll() is not None:
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()[-200:]}")
        yield found
    finally:
        server.terminate()
        server.wait()


def _edgeattn(folder: Path, fake_cuda: Path) -> str:
    """The command on the device: this edgeattn, with a fake driver and the stand-in TensorRT."""
    libraries = str(fake_cuda)
    if TENSORRT_RTX.is_available():
        (folder / "libraries").mkdir()
        rtx = TENSORRT_RTX.environment(folder / "libraries")["LD_LIBRARY_PATH"]
        libraries = f"{fake_cuda}:{rtx}"
    stand_in = Path(__file__).with_name("support") / "rtx_as_tensorrt"
    python_path = f"{stand_in}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    return f"""#!/bin/sh
echo $$ >{folder}/pid
export LD_LIBRARY_PATH='{libraries}' PYTHONPATH='{python_path}' PYTHONSAFEPATH=1
export FAKE_CUDA_SM=80 FAKE_CUDA_NAME='the fake A100'
. {folder}/settings
exec {sys.executable} -c '{SHIM}' "$@"
"""


@pytest.fixture(autouse=True)
def _client(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ssh, with a configuration that is not the user's; an empty home on the device."""
    device.client()
    (device.folder / "settings").write_text("")
    shutil.rmtree(device.home)
    device.home.mkdir()
    real = shutil.which("ssh")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {real} -F {device.folder}/client "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)


@pytest.fixture(scope="module")
def exported(export_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the A100 that says TensorRT-RTX took it, so that it is not asked each time."""
    path = tmp_path_factory.mktemp("bundles") / "with space's"
    shutil.copytree(export_tiny("a100", verify=False), path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["verification"]["tensorrt"] = "built"
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    path = tmp_path / exported.name
    shutil.copytree(exported, path)
    return path


@dataclass
class Seen:
    """What a progress display is told.

    Attributes:
        sent: bytes, of those to send.
    """

    sent: tuple[int, int] = (0, 0)
    stages: list[str] = field(default_factory=list)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.stages:
            self.stages.append(stage)
        if stage.startswith("sending"):
            self.sent = (done, total)


def build(device: Device, bundle: Path, command: str | None = None, **request: Any) -> Built:
    return build_on(
        device.host, bundle, BuildRequest(**request), command=command or str(device.edgeattn)
    )


def build_seen(device: Device, bundle: Path) -> tuple[Built, Seen]:
    seen = Seen()
    request, command = BuildRequest(), str(device.edgeattn)
    return build_on(device.host, bundle, request, command=command, progress=seen), seen


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@needs_rtx
def test_the_engine_comes_back_and_nothing_is_sent_twice(device: Device, bundle: Path) -> None:
    built, seen = build_seen(device, bundle)
    assert not built.was_there
    record = built.engine.record
    assert (record.gpu, record.flavour, record.sms) == ("the fake A100", "tensorrt", (80,))
    assert built.engine.path.parent == bundle / "engines"
    assert sha256(built.engine.path) == record.sha256
    assert read_engines(Bundle.open(bundle)) == (built.engine,)
    copy = device.copy(bundle)
    files = Bundle.open(copy).manifest.files
    whole = (bundle / "manifest.json").stat().st_size + sum(f.bytes for f in files.values())
    assert seen.sent == (whole, whole)
    assert not list(copy.rglob("*.part"))

    (copy / "engines" / f"{built.engine.path.stem}.selftest.json").write_text('{"passed": true}')
    again, seen = build_seen(device, bundle)
    assert again.was_there
    assert again.engine == built.engine
    assert seen.sent == (0, 0)
    assert not [stage for stage in seen.stages if "fetching" in stage]
    assert json.loads(again.engine.selftest_file.read_text()) == {"passed": True}
    assert sorted(file.name for file in (bundle / "engines").iterdir()) == [
        built.engine.path.name,
        f"{built.engine.path.name}.json",
        built.engine.selftest_file.name,
    ]

    # what was fetched only in part is taken up
    whole_engine = built.engine.path.read_bytes()
    built.engine.path.unlink()
    draft = bundle / "engines" / f".fetched-{record.sha256[:16]}"
    draft.write_bytes(whole_engine[:1000])
    build(device, bundle)
    assert built.engine.path.read_bytes() == whole_engine
    # and what was damaged is not
    built.engine.path.unlink()
    draft.write_bytes(b"x" * 1000)
    with pytest.raises(DeviceError, match="sha256 of its record, but it has another"):
        build(device, bundle)
    assert not built.engine.path.exists()
    build(device, bundle)
    assert built.engine.path.read_bytes() == whole_engine


@pytest.fixture
def refusing(device: Device) -> str:
    """A command that refuses at once, for tests of what comes before."""
    answer = json.dumps({"error": "expected a, but b: c", "exit_code": 1})
    return device.command(f"echo '{answer}'; exit 1")


def send(device: Device, bundle: Path, refusing: str) -> Seen:
    seen = Seen()
    with pytest.raises(LoweringError, match=f"expected a, but on {device.host}: b: c"):
        build_on(device.host, bundle, BuildRequest(), command=refusing, progress=seen)
    return seen


@pytest.mark.parametrize("cut", [1, 30_000, 200_000])
def test_a_broken_transfer_resumes(
    device: Device, bundle: Path, refusing: str, cut: int, tmp_path: Path
) -> None:
    """The line breaks after `cut` bytes of the files."""
    wrapper = tmp_path / "bin" / "ssh"
    whole = wrapper.read_text()
    send_only = f'case "$*" in *"head -c"*) head -c {cut} | '
    wrapper.write_text(f"{whole.replace('exec ', send_only)}exit;; esac\n{whole.splitlines()[1]}\n")
    with pytest.raises(DeviceError, match="transfer broke: run the same command again"):
        build(device, bundle, refusing)
    there = sum(file.stat().st_size for file in device.copy(bundle).rglob("*") if file.is_file())
    assert there == cut
    wrapper.write_text(whole)
    files = [file for file in bundle.rglob("*") if file.is_file()]
    seen = send(device, bundle, refusing)
    assert seen.sent[1] == sum(file.stat().st_size for file in files) - cut
    for file in files:
        assert sha256(device.copy(bundle) / file.relative_to(bundle)) == sha256(file)


def test_damaged_files_are_sent_again(device: Device, bundle: Path, refusing: str) -> None:
    send(device, bundle, refusing)
    weights = device.copy(bundle) / "model.onnx.data"
    size = weights.stat().st_size
    weights.write_bytes(bytes(size))
    assert send(device, bundle, refusing).sent == (size, size)
    # a part of something else shows when it is whole
    weights.unlink()
    weights.with_name("model.onnx.data.part").write_bytes(b"other")
    with pytest.raises(DeviceError, match="a file arrived damaged: run the same"):
        build(device, bundle, refusing)
    assert send(device, bundle, refusing).sent == (size, size)
    assert sha256(weights) == sha256(bundle / "model.onnx.data")


def test_only_a_copy_of_this_bundle_is_written_to(
    device: Device, bundle: Path, refusing: str
) -> None:
    for folder in ("full", f"{device.home}/full"):
        (device.home / "full").mkdir(exist_ok=True)
        (device.home / "full" / "photo").write_text("mine")
        where = f"{device.host}/~/{folder}" if folder == "full" else f"{device.host}{folder}"
        with pytest.raises(EdgeattnError, match="something else is there: name another"):
            build_on(where, bundle, BuildRequest(), command=refusing)
        assert [f.name for f in (device.home / "full").iterdir()] == ["photo"]


def test_a_folder_of_the_users_choice(device: Device, bundle: Path, refusing: str) -> None:
    name = "it's a $(touch pwned) `touch pwned` folder;touch pwned"
    with pytest.raises(LoweringError, match=r"on .*: b: c"):
        build_on(f"{device.host}/~/{name}", bundle, BuildRequest(), command=refusing)
    assert [folder.name for folder in device.home.iterdir()] == [name]
    assert (device.home / name / "model.onnx").is_file()


def test_options_are_handed_on(device: Device, bundle: Path) -> None:
    command = device.command(f'printf "%s\\n" "$@" >{device.folder}/options; exit 3')
    with pytest.raises(DeviceError, match="ended with exit code 3: it says nothing"):
        build(
            device,
            bundle,
            command,
            targets=("a100",),
            flavour="tensorrt",
            profiles=("decode.batch_size=1:1:1",),
            timing_cache=Path("my cache"),
            strip_weights=True,
            jobs=3,
            force=True,
        )
    options = (device.folder / "options").read_text().split("\n")
    wanted = "build --json --target a100 --flavour tensorrt --profile decode.batch_size=1:1:1"
    more = ["--timing-cache", "my cache", "--strip-weights", "--jobs", "3", "--force", "--"]
    assert options[:-2] == [*wanted.split(), *more]


@needs_rtx
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("FAKE_CUDA_SM=90", r"but on ssh://.*: its GPU is SM 90; .*: copy"),
        ('export PYTHONPATH=$(echo "$PYTHONPATH" | cut -s -d: -f2-)', "no Python module tensorrt"),
    ],
)
def test_the_device_refuses(device: Device, bundle: Path, settings: str, message: str) -> None:
    (device.folder / "settings").write_text(settings)
    with pytest.raises(EdgeattnError, match=message) as refusal:
        build(device, bundle)
    assert refusal.value.exit_code == 1
    assert not (bundle / "engines").exists()


def test_no_edgeattn_there(device: Device, bundle: Path) -> None:
    with pytest.raises(DeviceError, match=r"its shell finds none: pip install edgeattn .*--on-com"):
        build(device, bundle, "edgeattn-that-is-not-there")
    assert list(device.home.iterdir()) == []


def test_another_processor(
    device: Device, bundle: Path, refusing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BuildPlan, "host", "aarch64")
    with pytest.raises(LoweringError, match=r"a device with aarch64.*has x86_64"):
        build(device, bundle, refusing)
    assert not list(device.home.rglob("manifest.json*"))


def test_no_space_there(device: Device, bundle: Path, refusing: str) -> None:
    tools = device.folder / "tools"
    tools.mkdir()
    (tools / "df").write_text("#!/bin/sh\necho Avail\necho 1000\n")
    (tools / "df").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        from edgeattn.pipeline import remote_folder

        patch.setattr(remote_folder, "_LOOK", f"PATH={tools}:$PATH\n{remote_folder._LOOK}")
        with pytest.raises(DeviceError, match=r"MB of free disk.*but 0.0 MB are free"):
            build(device, bundle, refusing)


def test_the_check_here_comes_first(
    device: Device, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["verification"]["tensorrt"] = "not checked"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    report = BuildReport("refused", (80,), reason="the parser dislikes it")
    monkeypatch.setattr(build_module, "_check_here", lambda plan, progress: report)
    with pytest.raises(LoweringError, match="refuses it here: the parser dislikes it"):
        build(device, bundle)
    (bundle / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(EdgeattnError, match=r"model\.onnx of .* bytes"):
        build(device, bundle)
    assert list(device.home.iterdir()) == []


def test_wrong_key(device: Device, bundle: Path) -> None:
    device.client(key="other")
    with pytest.raises(
        DeviceError, match=r"Permission denied.*: set up a key or an agent.*ssh-copy"
    ):
        build(device, bundle)


def test_unknown_host_key(device: Device, bundle: Path) -> None:
    device.client(known="none")
    with pytest.raises(DeviceError, match=r"Host key verification failed.*: connect once by hand"):
        build(device, bundle)


def test_closed_port(bundle: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        where = f"ssh://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(DeviceError, match=r"Connection refused: check that this works"):
            build_on(where, bundle, BuildRequest())


def test_no_ssh_here(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EdgeattnError, match=r"expected ssh, .*not installed here"):
        build_on("jetson", bundle, BuildRequest())


@pytest.mark.parametrize(
    "answer",
    [
        {"engine": "../../evil.engine"},
        {"engine": "-evil.engine"},
        {"engine": ".evil.engine"},
        {"engine": ["evil.engine"]},
        {},
    ],
)
def test_an_engine_must_have_a_plain_name(
    device: Device, bundle: Path, answer: dict[str, Any]
) -> None:
    before = sorted(bundle.parent.rglob("*"))
    with pytest.raises(DeviceError, match="it names the engine"):
        build(device, bundle, device.command(f"printf '%s' '{json.dumps(answer)}'"))
    assert sorted(bundle.parent.rglob("*")) == before


@pytest.mark.parametrize("output", ["no JSON", "[1]"])
def test_an_answer_must_be_one(device: Device, bundle: Path, output: str) -> None:
    with pytest.raises(DeviceError, match="to tell its outcome, but it ended with exit code 0"):
        build(device, bundle, device.command(f"echo '{output}'"))


@pytest.mark.parametrize("record", ["", "{}"])
def test_a_record_must_be_one(device: Device, bundle: Path, record: str) -> None:
    lines = f"""
    for folder; do :; done
    mkdir -p "$folder/engines"
    echo '{record}' >"$folder/engines/e.engine.json"
    echo '{{"engine": "e.engine"}}'
    """
    with pytest.raises(DeviceError, match=r"no record of e\.engine that reads"):
        build(device, bundle, device.command(lines))
    assert not (bundle / "engines").exists()


@needs_rtx
@pytest.mark.parametrize(
    "change",
    [
        {"engine": "other.engine"},
        {"model_sha256": "0" * 64},
        {"plugins": {"abi": 1, "file": "../../evil.so", "sha256": "0" * 64, "layers": 1}},
    ],
)
def test_a_record_must_be_of_this_bundle(
    device: Device, bundle: Path, change: dict[str, Any], record: str
) -> None:
    lines = f"""
    for folder; do :; done
    mkdir -p "$folder/engines"
    cat >"$folder/engines/e.engine.json" <<'EOF'
{json.dumps({**json.loads(record), "engine": "e.engine", **change})}
EOF
    echo '{{"engine": "e.engine"}}'
    """
    with pytest.raises(DeviceError, match=r"another engine or graph|library that is not ours"):
        build(device, bundle, device.command(lines))
    assert not (bundle / "engines").exists()


@pytest.fixture(scope="module")
def record(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The record of an engine of the bundle, made by TensorRT-RTX."""
    path = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(exported, path)
    request = BuildRequest(flavour="tensorrt-rtx")
    return build_module.build_bundle(path, request).engine.record.to_json()


@needs_rtx
def test_ctrl_c_ends_the_build_there(device: Device, bundle: Path, tmp_path: Path) -> None:
    words = ["build", bundle, "--on", device.host, "--on-command", device.edgeattn]
    with subprocess.Popen(
        [sys.executable, "-c", SHIM, *words], stderr=subprocess.PIPE, start_new_session=True
    ) as here:
        wait_until(lambda: list(device.home.rglob(".building-*")))
        there = int((device.folder / "pid").read_text())
        assert is_alive(there)
        here.send_signal(signal.SIGINT)
        _, stderr = here.communicate(timeout=20)
    assert here.returncode == 130
    assert b"interrupted" in stderr
    wait_until(lambda: not is_alive(there))
    wait_until(lambda: not list(device.home.rglob("engines")))
    assert not (bundle / "engines").exists()


def test_command_line(device: Device, bundle: Path, refusing: str, edgeattn: Any) -> None:
    done = edgeattn("build", bundle, "--on", device.host, "--on-command", refusing, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"] == f"expected a, but on {device.host}: b: c"
    done = edgeattn("build", bundle, "--on-command", refusing)
    assert done.exit_code == 2
    assert "expected --on-command beside --on" in done.stderr


@pytest.mark.parametrize(
    ("text", "host", "folder"),
    [
        ("jetson", "jetson", None),
        ("me@jetson:", "me@jetson", None),
        ("me@jetson:a b", "me@jetson", "a b"),
        ("me@jetson:~/models", "me@jetson", "models"),
        ("jetson:/data/", "jetson", "/data"),
        ("me@[fe80::1]:x", "me@fe80::1", "x"),
        ("ssh://me@jetson:2222", "ssh://me@jetson:2222", None),
        ("ssh://jetson/data/x", "ssh://jetson", "/data/x"),
        ("ssh://jetson:22/~/x", "ssh://jetson:22", "x"),
    ],
)
def test_addresses(text: str, host: str, folder: str | None) -> None:
    found = parse_address(text)
    assert (found.host, found.folder) == (host, folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-oProxyCommand=x",
        "me@-x",
        "-l@host",
        ":x",
        "me@",
        "@x",
        "a b",
        "ssh://",
        "ssh://-x",
        "a\nb",
    ],
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="expected --on"):
        parse_address(text)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
