# SPDX-License-Identifier: Apache-2.0

"""What an agent can do: the schema of a server's actions in, how its text or its calls become them out.

Three forms. TOOLS: the environment has tools, and a call of one is an action. TEXT: the action has one text field, and
what the agent writes is that. CALL: otherwise; the action is a tool of its own, with its fields as arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.openenv.options import module
from hintsd_jax.errors import UserError
from hintsd_jax.texts import did_you_mean

TOOLS, TEXT, CALL = "tools", "text", "call"
_NOT_THE_AGENTS = "metadata"  # every action has it
_ACT = "act"  # where the action has no name


@dataclass(frozen=True)
class Form:
    """How an agent acts. schema: of the server's actions. field: of TEXT."""

    kind: str
    schema: Mapping[str, Any]
    field: str = ""

    @property
    def name(self) -> str:
        """Of the one tool of CALL."""
        return self.schema.get("title") or _ACT

    def tools(self, of_the_environment: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        """As a chat template expects them."""
        if self.kind == CALL:
            hidden = ("title", "description", "additionalProperties")
            parameters = {key: value for key, value in self.schema.items() if key not in hidden}
            parameters["properties"] = _fields(self.schema)
            return (_tool(self.name, self.schema.get("description") or "", parameters),)
        return tuple(
            _tool(tool["name"], tool.get("description") or "", tool.get("input_schema") or {})
            for tool in of_the_environment
        )

    def said(self, text: str) -> dict[str, Any]:
        """The action of a text, where the form is TEXT."""
        return {self.field: text}

    def called(self, call: ToolCall) -> dict[str, Any] | None:
        """The action of a call; None where there is no such tool. Of an environment's own tools it knows itself."""
        if self.kind == TOOLS:
            return {"type": "call_tool", "tool_name": call.name, "arguments": call.arguments}
        return dict(call.arguments) if call.name == self.name else None

    def mistake(self, action: Mapping[str, Any]) -> str | None:
        """What of an action does not fit the schema, for the agent; None where all does."""
        jsonschema = module("jsonschema")
        errors = jsonschema.validators.validator_for(self.schema)(self.schema).iter_errors(dict(action))
        worst = jsonschema.exceptions.best_match(errors)
        if worst is None:
            return None
        return ": ".join(filter(None, (".".join(map(str, worst.absolute_path)), worst.message)))


def form_of(schema: Mapping[str, Any], field: str = "") -> Form:
    """The form of a server's actions. field: of the options; "" for what the schema says.

    Raises:
      UserError: the action has no such field, or one that takes no text.
    """
    fields = _fields(schema)
    if field:
        if field not in fields:
            known = did_you_mean(field, fields, f"it has {', '.join(fields) or 'none'}")
            raise UserError(f"openenv: env.options.field = {field!r}: the action has no such field; {known}")
        others = [name for name in schema.get("required", ()) if name not in (field, _NOT_THE_AGENTS)]
        if others or not _takes_text(fields[field]):
            why = f"it needs {', '.join(others)} too" if others else "that field takes no text"
            raise UserError(f"openenv: env.options.field = {field!r} cannot be the whole action: {why}")
        return Form(TEXT, schema, field)
    if not fields or fields.get("type", {}).get("const") in ("call_tool", "list_tools"):
        return Form(TOOLS, schema)
    names = list(fields)
    if len(names) == 1 and _takes_text(fields[names[0]]):
        return Form(TEXT, schema, names[0])
    return Form(CALL, schema)


def _fields(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are an agent's to fill in, without the titles that repeat their names."""
    return {
        name: {key: value for key, value in about.items() if key != "title"}
        for name, about in schema.get("properties", {}).items()
        if name != _NOT_THE_AGENTS
    }


def _takes_text(about: Mapping[str, Any]) -> bool:
    return about.get("type") == "string" and "enum" not in about and "const" not in about


def _tool(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}
