"""What `doctor` says: findings, each with what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from edgeattn.devices.probe import Probe
from edgeattn.errors import EdgeattnError
from edgeattn.planner.fit import Choice, MemoryFit

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: "problem" where it will not work, "warning" where it may not or something is missing
            that only some work needs.
        about: what was looked at, in a word or two.
        found: what came out.
        fix: what to do, empty with "ok".
    """

    level: Level
    about: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings about a model, a bundle or this machine.

    Attributes:
        subject: MODEL or BUNDLE; None for the machine alone.
        target: NAME@SOFTWARE it was judged for; None where there is none.
        findings: in the order they were looked at.
        memory: what the model takes; None without one.
        choices: what would fit, where it does not.
        machine: the facts of this machine.
    """

    subject: str | None
    target: str | None
    findings: tuple[Finding, ...]
    machine: Probe
    memory: MemoryFit | None = None
    choices: tuple[Choice, ...] = field(default=())

    @property
    def works(self) -> bool:
        """Whether nothing speaks against it."""
        return all(finding.level != "problem" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        memory = self.memory.to_dict() if self.memory else None
        return {**asdict(self), "memory": memory, "works": self.works}


def refused(about: str, error: EdgeattnError, level: Level = "problem") -> Finding:
    """A refusal as a finding."""
    return Finding(level, about, f"expected {error.expected}, but {error.came}", error.todo)


def attempt(about: str, check: Callable[[], str], level: Level = "problem") -> Finding:
    """What a check says, or its refusal.

    Args:
        about: what is looked at.
        check: gives a sentence, or raises an EdgeattnError.
        level: of a refusal.
    """
    try:
        return Finding("ok", about, check())
    except EdgeattnError as error:
        return refused(about, error, level)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
