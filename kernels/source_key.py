"""What a kernel's code is known by: its own text, its constants and the functions it calls."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any


def source_key(function: Any) -> str:
    """SHA-256 of a `triton.jit` function's code, in the same words in every process.

    Triton's own `cache_key` depends on whose key was read first: a function that is read before
    those it calls lacks the constants they use (3.7.1, `DependenciesFinder._update_hash`).

    What Triton itself brings is not in it, the version of Triton says that. Neither are places in
    a file: a cubin without line numbers does not depend on them.
    """
    parts: dict[int, list[Any]] = {}
    waiting = [function]
    while waiting:
        current = waiting.pop()
        # not by `hash`, which is Triton's key
        if id(current) in parts:
            continue
        constants = {}
        for name, value in _references(current):
            if _is_function(value):
                waiting.append(value)
            elif not (isinstance(value, ModuleType | type) or inspect.isroutine(value)):
                constants[name] = repr(value)
        place = f"{current.fn.__module__}.{current.fn.__qualname__}"
        inline = not getattr(current, "noinline", False)
        parts[id(current)] = [place, _text(current), inline, sorted(constants.items())]
    ordered = sorted(parts.values())
    return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()


def _is_function(value: Any) -> bool:
    """Whether it is a kernel of ours or a function that kernels call."""
    jitted = hasattr(value, "src") and hasattr(value, "fn")
    return jitted and not _is_triton(value.fn.__module__)


def _is_triton(module: str) -> bool:
    return module.partition(".")[0] == "triton"


def _text(function: Any) -> str:
    # the text that was compiled, which the file may no longer have
    return textwrap.dedent(function.src)


def _references(function: Any) -> Iterator[tuple[str, Any]]:
    """Global names in it, with what they are; those of a module of ours by their dotted names."""
    captured = inspect.getclosurevars(function.fn).nonlocals
    names: Mapping[str, Any] = {**function.fn.__globals__, **captured}
    for node in ast.walk(ast.parse(_text(function))):
        if isinstance(node, ast.Name) and node.id in names:
            yield node.id, names[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, ModuleType) and not _is_triton(module.__name__):
                yield f"{node.value.id}.{node.attr}", getattr(module, node.attr, None)
