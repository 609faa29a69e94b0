"""The exception family of edgeattn: each error says what was expected, what came, what to do.

The second paragraph of a class says what a user does about errors of its kind; the documentation
shows both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class EdgeattnError(Exception):
    """A refusal that a user can act on.

    The three parts are joined to one sentence, so that no message can forget one of them.

    Args:
        expected: what edgeattn needed, as a noun phrase ("a config.json in ./model").
        came: what it found instead, as a clause ("the directory holds none").
        todo: what the user can do now, as an imperative ("pass a Hugging Face directory").
        details: JSON-ready facts behind the sentence, for `--json`.
    """

    exit_code = 1

    def __init__(
        self, *, expected: str, came: str, todo: str, details: Mapping[str, Any] | None = None
    ) -> None:
        self.expected, self.came, self.todo = expected, came, todo
        self.details = dict(details or {})
        super().__init__(f"expected {expected}, but {came}: {todo}")


class UsageError(EdgeattnError):
    """The command line or recipe names something that does not exist or does not parse.

    Correct the name or value; the sentence lists near ones, `--help` and `edgeattn targets` all.
    """

    exit_code = 2


class CheckpointError(EdgeattnError):
    """The checkpoint is missing, broken, or of a kind edgeattn does not read.

    Pass a whole Hugging Face directory, `.gguf` file or hub id of a family that the README lists.
    """


class LoweringError(EdgeattnError):
    """The target cannot run what the recipe asks for.

    Choose another target, software, scheme or variant; `edgeattn doctor` says which would do.
    """


class BundleError(EdgeattnError):
    """A bundle is missing, damaged, in the way, or made for something else.

    Export it again, or copy it whole; `--force` replaces one that is in the way.
    """


class ProofError(EdgeattnError):
    """Two implementations that must agree do not.

    Do not use the bundle: the sentence names the first layer that differs; report it.
    """


class MissingDependencyError(EdgeattnError):
    """An optional package or tool is needed and not installed.

    Install what the sentence names, often an extra of edgeattn.
    """


class DeviceError(EdgeattnError):
    """A device over the network cannot be reached, or stopped in the middle.

    Check that `ssh` alone reaches it, then run the same command again: it goes on.
    """


class RuntimeInputError(EdgeattnError):
    """A text, prompt or tensor given at run time cannot be used.

    Change the input as the sentence says: its length, dtype, shape or encoding.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not registered; suggests the near ones.

    Args:
        kind: what the name stands for ("target", "scheme", ...).
        name: the name the user gave.
        known: all registered names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    todo = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
    return UsageError(expected=f"a known {kind}", came=f"'{name}' is none", todo=todo)
