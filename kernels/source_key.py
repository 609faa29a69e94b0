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
        names: dict[str, str] = {}
        for name, value in _references(current):
            if _is_function(value):
                names[name] = _place(value)
                waiting.append(value)
            elif not (isinstance(value, ModuleType | type) or inspect.isroutine(value)):
                names[name] = _constant(value)
        inline = not getattr(current, "noinline", False)
        given = inspect.signature(current.fn).parameters.values()
        defaults = [_constant(parameter.default) for parameter in given]
        part = [_place(current), _text(current), inline, defaults, sorted(names.items())]
        parts[id(current)] = part
    ordered = sorted(parts.values())
    return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()


def _place(function: Any) -> str:
    return f"{function.fn.__module__}.{function.fn.__qualname__}"


def _constant(value: Any) -> str:
    # a constexpr shows a text as it shows a number
    return repr(value.value if type(value).__name__ == "constexpr" else value)


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
    """Names in it of what is outside of it, with what they are; through modules by dotted names."""
    captured = inspect.getclosurevars(function.fn).nonlocals
    names: Mapping[str, Any] = {**function.fn.__globals__, **captured}
    for node in ast.walk(ast.parse(_text(function))):
        if isinstance(node, ast.Name) and node.id in names:
            yield node.id, names[node.id]
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node), _through_modules(node, names)


def _through_modules(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """What an attribute of a module of ours is, of a module in it too; else None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    module = _through_modules(node.value, names)
    if not isinstance(module, ModuleType) or _is_triton(module.__name__):
        return None
    return getattr(module, node.attr, None)
