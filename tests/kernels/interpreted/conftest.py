"""Triton's interpreter, made to look up once what it looks up in every call."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from triton.language.core import is_builtin
from triton.runtime import interpreter


@cache
def builtins_of(namespace: Any) -> tuple[str, ...]:
    """Names of Triton's functions in a module or class of its own, of which there are no others."""
    return tuple(name for name in dir(namespace) if is_builtin(getattr(namespace, name)))


@pytest.fixture(autouse=True, scope="session")
def quick_calls() -> None:
    """Each call of a device function goes through hundreds of names, a third of all the time."""

    def patch_builtin(namespace: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(namespace):
            member = getattr(namespace, name)
            if is_builtin(member):
                interpreter._patch_attr(namespace, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
