"""Chat templates: Jinja as Hugging Face runs it, in a sandbox since they come with the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from edgeattn.errors import MissingDependencyError, RuntimeInputError

if TYPE_CHECKING:
    from jinja2 import Template


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Fills in a chat template.

    Args:
        template: Jinja source.
        variables: `messages`, `add_generation_prompt`, `bos_token` and whatever else it reads.

    Raises:
        RuntimeInputError: the template does not parse, fails, reads what is not there, or does
            what the sandbox forbids.
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        return _compile(template).render(tools=None, documents=None, **variables)
    except (MissingDependencyError, RuntimeInputError):
        raise
    except Exception as error:  # a template is a program and may fail in every way a program can
        raise RuntimeInputError(
            expected="the bundle's chat template to render the conversation",
            came=f"it fails ({type(error).__name__}: {error})",
            todo="leave --chat out, or correct chat_template.jinja in the checkpoint and export",
        ) from error


def _compile(source: str) -> Template:
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingDependencyError(
            expected="the jinja2 package",
            came=f"it cannot be imported ({error})",
            todo="pip install jinja2",
        ) from error

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it only prints them."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an attribute of the instance

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(value: object, **options: Any) -> str:
    # jinja2's own filter escapes HTML and sorts keys.
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> NoReturn:
    raise RuntimeInputError(
        expected="a conversation that the bundle's chat template takes",
        came=f"it says: {message}",
        todo="change the conversation, or leave --chat out",
    )
