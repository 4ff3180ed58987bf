# SPDX-License-Identifier: Apache-2.0

"""Tools from typed Python methods: a method with a docstring goes in; its documentation for chat templates, and a
reader of its arguments come out.

Invariant: what a method gets are values of the types that it names, made anew from JSON, whatever a model wrote; what
does not fit them never reaches it and is told to the agent in one line.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypeVar, overload

import pydantic
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypedDict

from hintsd_jax.envs.base import CallError
from hintsd_jax.errors import UserError
from hintsd_jax.texts import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "_hintsd_jax_tool"
_MAX_PROBLEMS, _MAX_PLACE_CHARS = 3, 100  # of what the agent is told of one call
_WORDS = {"missing": "is missing", "extra_forbidden": "is unknown"}
_ARGS = re.compile(r"^[ \t]*(?:Args|Arguments|Parameters):[ \t]*$", re.MULTILINE)
_SECTION = re.compile(r"^(?:Returns|Raises|Yields|Examples?|Notes?):", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+)(?: *\([^()\n]*\))?:(.*(?:\n[ \t]+.*|\n)*)", re.MULTILINE)


@overload
def tool(method: F) -> F: ...
@overload
def tool() -> Callable[[F], F]: ...
def tool(method: Any = None) -> Any:
    """Marks a method as a tool that the agent may call; see `hintsd_jax.envs.tool_env.ToolEnv`. As `@tool` or as
    `@tool()`.
    """
    if method is None:
        return tool
    setattr(method, _MARK, True)
    return method


@dataclass(frozen=True)
class Tool:
    """One tool. schema: in the function-calling form that chat templates expect."""

    name: str
    schema: Mapping[str, Any]
    _reader: pydantic.TypeAdapter

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, of the types that the method names; those that it leaves out are not in it.

        Raises:
          CallError: they do not fit: one line for the agent.
        """
        try:
            return self._reader.validate_json(json.dumps(given), strict=True)
        except pydantic.ValidationError as error:
            problems = [_in_words(each) for each in error.errors(include_url=False, include_input=False)]
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise CallError(f"{self.name}: {'; '.join(problems[:_MAX_PROBLEMS])}{more}")


def tools_of(cls: type) -> dict[str, Tool]:
    """The tools of a class by name: base classes first, each in the order in which it has them. `name = None` takes one
    of a base class away.

    Raises:
      UserError: a tool's signature or docstring does not say what a call needs, or a tool is overridden by a method
        without the mark. One line that names the method.
    """
    names = dict.fromkeys(name for base in reversed(cls.__mro__) for name in vars(base))
    members = {name: inspect.getattr_static(cls, name) for name in names}
    for name, value in members.items():
        overridden = [vars(base)[name] for base in cls.__mro__ if name in vars(base)][1:2]
        if value is not None and not _is_marked(value) and any(map(_is_marked, overridden)):
            where = f"tool {cls.__name__}.{name}"
            raise UserError(f"{where} has no @tool: repeat it, or write {name} = None to take it away")
    return {name: _read(cls, name, value) for name, value in members.items() if _is_marked(value)}


def _is_marked(value: Any) -> bool:
    """Also where a static or class method holds the marked function."""
    return any(_MARK in getattr(each, "__dict__", {}) for each in (value, getattr(value, "__func__", None)))


def _read(cls: type, name: str, method: Any) -> Tool:
    where = f"tool {cls.__name__}.{name}"
    plain = inspect.isfunction(method) and not inspect.iscoroutinefunction(method)
    if not plain or not inspect.signature(method).parameters:
        raise UserError(f"{where}: make it a plain method, `def {name}(self, ...)`")
    text = inspect.cleandoc(method.__doc__ or "")
    purpose, described = _docstring(text)
    if not purpose:
        raise UserError(f"{where} has no docstring: say in one what it does; the agent reads it")
    parameters = list(inspect.signature(method).parameters.values())[1:]  # without self
    hints = _hints(where, method)
    for parameter in parameters:
        _check(where, parameter, hints)
    if unknown := sorted(set(described) - {parameter.name for parameter in parameters}):
        hint = did_you_mean(unknown[0], [parameter.name for parameter in parameters])
        raise UserError(f"{where}: its docstring has the argument {unknown[0]!r}, its signature has not; {hint}")
    fields = {}
    for parameter in parameters:
        field = Annotated[hints[parameter.name], pydantic.Field(description=described.get(parameter.name))]
        fields[parameter.name] = field if parameter.default is parameter.empty else NotRequired[field]
    reader, schema = _reader(where, fields)
    for parameter in parameters:
        if parameter.default is not parameter.empty and _is_json(parameter.default):
            schema["properties"][parameter.name]["default"] = parameter.default
    function = {"name": name, "description": purpose, "parameters": schema}
    return Tool(name, {"type": "function", "function": function}, reader)


def _hints(where: str, method: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(method, include_extras=True)
    except Exception as error:  # a name in quotes that nothing stands for
        raise UserError(f"{where}: its types cannot be read ({type(error).__name__}: {error})") from error


def _check(where: str, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise UserError(f"{where} takes {parameter}: name each argument, the agent has to know them")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise UserError(f"{where}: {parameter.name} is positional only, and calls give arguments by name")
    if parameter.name not in hints:
        raise UserError(f"{where}: {parameter.name} has no type: write `{parameter.name}: str`, or what it is")


class _Plain(GenerateJsonSchema):
    """pydantic's schemas without titles that only repeat the names, and in the order in which models have read others:
    the type comes first.
    """

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def sort(self, value: Any, parent_key: str | None = None) -> Any:
        return value


def _reader(where: str, fields: Mapping[str, Any]) -> tuple[pydantic.TypeAdapter, dict[str, Any]]:
    """(what reads a call's arguments, their JSON schema)."""
    typed_dict: Any = TypedDict  # pyright knows only those whose fields are written out
    form = typed_dict("Arguments", dict(fields))
    try:
        reader = pydantic.TypeAdapter(pydantic.with_config(pydantic.ConfigDict(extra="forbid"))(form))
        schema = reader.json_schema(schema_generator=_Plain)
    except (pydantic.errors.PydanticUserError, TypeError) as error:
        for name, field in fields.items():  # the first that fails by itself
            if len(fields) > 1:
                _reader(where, {name: field})
        [name] = list(fields)[:1]
        raise UserError(
            f"{where}: {name} has a type that JSON has no form of:"
            " use str, int, float, bool, list, dict, Literal, Optional"
        ) from error
    return reader, {key: schema[key] for key in ("type", "properties", "required", "$defs") if key in schema}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """(what a docstring says of the method, of each argument), from its lines before `Args:` and the entries below."""
    head, *rest = _ARGS.split(text, maxsplit=1)
    purpose = _SECTION.split(head, maxsplit=1)[0].strip()
    entries = _SECTION.split(rest[0], maxsplit=1)[0] if rest else ""
    found = _ARGUMENT.findall(inspect.cleandoc(entries))
    return purpose, {name: " ".join(said.split()) for name, said in found if said.strip()}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _in_words(problem: Mapping[str, Any]) -> str:
    place = ".".join(str(part)[:_MAX_PLACE_CHARS] for part in problem["loc"])[:_MAX_PLACE_CHARS]
    return f"{place} {_WORDS[problem['type']]}" if problem["type"] in _WORDS else f"{place}: {problem['msg']}"
