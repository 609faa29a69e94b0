"""What bash, zsh and fish are told to offer, asked as the shells ask."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("edgeattn")
REPOSITORY = Path(__file__).parents[2]


def bash(line: str) -> list[str]:
    """What our bash script puts before the user, for a line with the cursor at its end."""
    ask = (
        'source <("$PROGRAM" completion bash); compopt() { :; };'
        '_edgeattn_completion "$PROGRAM"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    # bash gives these to a completion function; COMP_WORDBREAKS it has itself
    place = {
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_WORDBREAKS": " \t\n\"'><=;|&(:@",
    }
    done = subprocess.run(
        ["bash", "-c", ask],
        env=os.environ | place | {"PROGRAM": str(PROGRAM)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


def asked(shell: str, *words: str) -> str:
    """What click answers zsh or fish, the last word being incomplete."""
    line = ("edgeattn", *words)
    place = {"COMP_WORDS": " ".join(line), "COMP_CWORD": str(len(words))}
    if shell == "fish":
        place = {"COMP_WORDS": " ".join(line[:-1]), "COMP_CWORD": words[-1]}
    environment = place | {"_EDGEATTN_COMPLETE": f"{shell}_complete"}
    return subprocess.run(
        [PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("edgeattn qua", ["quantize"]),
        ("edgeattn nonsense --", ["--version", "--help"]),
        ("edgeattn export m --target jetson-orin-nano", None),
        ("edgeattn export m --target jetson-orin@", ["@jetpack6.2", "@jetpack7.2"]),
        ("edgeattn export m --target=jetson-orin-agx-32gb@jetpack6", ["@jetpack6.2"]),
        ("edgeattn export m --target nonsense@", []),
        ("edgeattn export m --quant w4a16-s", ["w4a16-spinquant", "w4a16-spinquant-learned"]),
        ("edgeattn export m --quant w4-rtn:", ["group=", "down_proj="]),
        ("edgeattn export m --quant w4-rtn:group=32,", ["32,down_proj="]),
        ("edgeattn export m --attention ", ["gqa", "fft-rope", "head-sparse", "recurrent", "lion"]),
        ("edgeattn export m --attention lion:", ["variant="]),
        ("edgeattn export m --kv-cache ", ["growing", "static"]),
        ("edgeattn ops H", ["HadamardTransform", "HeadSparseAttention"]),
        ("edgeattn plugins build --arch a", ["aarch64"]),
        ("edgeattn run ", []),  # a bundle: bash's own names of files
    ],
)
def test_bash(line: str, offered: list[str] | None) -> None:
    found = bash(line)
    if offered is None:
        assert set(found) == {"jetson-orin-nano", "jetson-orin-nano-4gb", "jetson-orin-nano-8gb"}
    else:
        assert sorted(found) == sorted(offered)


# How each starts without the user's settings, and what makes it complete.
TERMINALS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], ""),
    "zsh": (["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u -D; "),
}


@pytest.mark.parametrize("shell", TERMINALS)
@pytest.mark.parametrize(
    ("word", "whole"),
    [
        ("--target jetson-thor-t4000@jet", "--target jetson-thor-t4000@jetpack7.2 "),
        ("--target=jetson-thor-t4000@jet", "--target=jetson-thor-t4000@jetpack7.2 "),
        ("--quant w4-rtn:gr", "--quant w4-rtn:group="),
        ("--quant w4-rtn:group=32,do", "--quant w4-rtn:group=32,down_proj="),
        ("--quant=w4-rtn:group=32,do", "--quant=w4-rtn:group=32,down_proj="),
        ("--calibration=pyproj", "--calibration=pyproject.toml "),
    ],
)
def test_the_line_comes_out_whole_in_a_terminal(shell: str, word: str, whole: str) -> None:
    """Readline replaces what stands behind the last of its breaks, and it breaks at @, : and =."""
    command, prepared = TERMINALS[shell]
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    if shell == "zsh":
        whole = whole.strip()  # it takes the blank back when the cursor moves
    typed = (
        f"PATH={PROGRAM.parent}:$PATH; {prepared}source <(edgeattn completion {shell})\n"
        f"edgeattn export m {word}\t"
        "\x01echo '<'\x05'>'; exit\n"  # to the line's start and end
    )
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command,
        env=os.environ | {"TERM": "dumb", "COLUMNS": "500"},
        cwd=REPOSITORY,
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    os.write(master, typed.encode())
    shown = b""
    with contextlib.suppress(OSError):  # what Linux says when the other side is gone
        while part := os.read(master, 4096):
            shown += part
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert f"<edgeattn export m {whole}>" in shown.decode()
    if shell == "zsh":  # it rings where a completer says that it found nothing
        assert b"\a" not in shown


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
@pytest.mark.parametrize(
    ("word", "offered"),
    [
        ("--target jetson-thor-t4000@", ["jetson-thor-t4000@jetpack7.2"]),
        ("--target=jetson-thor-t4000@", ["--target=jetson-thor-t4000@jetpack7.2"]),
        ("--quant w4-rtn:group=32,", ["w4-rtn:group=32,down_proj="]),
        ("--calibration=pyproj", ["--calibration=pyproject.toml"]),
        ("--calibration pyproj", ["pyproject.toml"]),
    ],
)
def test_fish(word: str, offered: list[str]) -> None:
    ask = f"edgeattn completion fish | source; complete -C 'edgeattn export m {word}'"
    path = f"{PROGRAM.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", ask],
        env=os.environ | {"PATH": path},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == offered


def test_zsh_and_fish() -> None:
    zsh = asked("zsh", "export", "m", "--target", "jetson-thor-t")
    assert zsh.split("\n")[:3] == ["plain", "jetson-thor-t4000", "_"]
    fish = asked("fish", "export", "m", "--attention", "head")
    assert fish.strip() == "plain,head-sparse"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script(shell: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [PROGRAM, "completion", shell], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"_EDGEATTN_COMPLETE={shell}_complete" in done.stdout
    if shutil.which(shell) is not None:  # zsh and fish are on few machines
        file = tmp_path / "script"
        file.write_text(done.stdout)
        subprocess.run([shell, "-n", file], check=True, timeout=60)


def test_an_unknown_shell_is_refused() -> None:
    done = subprocess.run([PROGRAM, "completion", "fisch"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean fish" in done.stderr


def test_completing_loads_nothing_heavy() -> None:
    code = (
        "import sys; from edgeattn.cli import main\n"
        "try: main(prog_name='edgeattn')\n"
        "except SystemExit: print([m for m in HEAVY if m in sys.modules])"
    ).replace("HEAVY", "('torch', 'numpy', 'onnx', 'onnxruntime', 'rich')")
    line = "edgeattn export m --target jetson-t"
    place = {"_EDGEATTN_COMPLETE": "bash_complete", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | place,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "jetson-thor-t4000" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
