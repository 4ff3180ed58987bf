# SPDX-License-Identifier: Apache-2.0

"""The words of a prompt set: a TOML file, or a mapping of its form, flows in; checked texts with names to fill flow
out.

Such a file has tables of four kinds. `words` are plain texts, which may stand anywhere. `parts` are texts with names in
braces, which stand where `when` is there, and `without` where it is not. All other tables are templates, see `FORMS`: a
name in braces is a word, a part, or what the place where it stands knows (`Form.knows`). A brace itself is written
twice. `extends` names a shipped set, whose texts hold where the file has none.

Invariant 9 from this side: what is filled in is never read for names in braces again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hintsd_jax.errors import UserError, reason
from hintsd_jax.texts import did_you_mean, is_encodable

_PIECE = re.compile(r"\{\{|\}\}|\{(\w+)\}|[{}]")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_NAME_ALONE = re.compile(r"\{([A-Za-z]\w*)\}")

# What of an episode, and of a step, can be told: texts, and flags, which stand in `when` alone.
_EPISODE = ("benchmark", "kinds_of_mistake", "task_id", "task", "messages", "tools", "reward", "ended", "steps")
_EPISODE += ("last_feedback",)
_STEP = ("number", "action", "bare_action", "observation", "tools", "reward")
_JUDGED = ("action", "bare_action", "observation")
FLAGS = ("success", "terminated", "stopped", "rewarded")


@dataclasses.dataclass(frozen=True)
class Form:
    """What a template may and must hold. needs: sets of names, one of each must be there, in one of the templates
    `with_` or in itself. optional: it may be absent, and then there is no such message.
    """

    knows: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...] = ()
    flags: tuple[str, ...] = ()
    with_: str = ""
    optional: bool = False


def _question(name: str, knows: tuple[str, ...], needs: tuple[tuple[str, ...], ...], *flags: str) -> dict[str, Form]:
    system = Form(knows, (), flags, optional=True)
    return {f"{name}.system": system, f"{name}.user": Form(knows, needs, flags, with_=f"{name}.system")}


_OUTCOME = ("success", "terminated", "stopped")
_TASK, _ACTION = ("task", "messages"), ("action", "bare_action")
FORMS: dict[str, Form] = {
    "attempt.message": Form(("role", "content"), (("content",),)),
    "attempt.step": Form(_STEP, (("number",), _ACTION, ("observation",)), ("rewarded", "terminated")),
    "attempt.omission": Form(()),
    **_question("review", (*_EPISODE, "max_targets"), (_TASK, ("steps",), ("max_targets",)), *_OUTCOME),
    **_question("review_first", _EPISODE, (_TASK, ("steps",)), *_OUTCOME),
    **_question("step_feedback", (*_EPISODE, "step"), (_TASK, ("steps",), ("step",)), *_OUTCOME),
    **_question("verdict", _JUDGED, (_ACTION, ("observation",))),
    **_question("hint", _JUDGED, (_ACTION, ("observation",))),
    "teacher.feedback": Form(("feedback",), (("feedback",),)),
    "teacher.hint": Form(("message", "hint"), (("message",), ("hint",))),
    "teacher.solution": Form(("message", "actions"), (("actions",),)),
    "teacher.solution_step": Form(("number", *_ACTION), (_ACTION,)),
    "teacher.targets": Form(("message", "feedbacks"), (("feedbacks",),)),
    "teacher.target": Form(("step", "feedback"), (("feedback",),)),
}
_TABLES = {name.partition(".")[0] for name in FORMS}
_KNOWN = {name for form in FORMS.values() for name in form.knows}


@dataclasses.dataclass(frozen=True)
class Part:
    """`text` where `when` is there (always, of ""), else `without`."""

    text: str
    when: str = ""
    without: str = ""


@dataclasses.dataclass(frozen=True)
class Wording:
    """Checked words, parts and templates by their names, in the order of the file; `templates` has "" for an optional
    one that is absent.
    """

    words: Mapping[str, str]
    parts: Mapping[str, Part]
    templates: Mapping[str, str]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for every letter of it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def fill(self, template: str, values: Mapping[str, Any]) -> str:
        """A template with what its names stand for. values: all that its form knows; flags as bool."""
        return self._filled(self.templates[template], values)

    def uses(self, template: str, name: str) -> bool:
        """Whether a name stands in a template, or in a part of it."""
        return name in _reached(self, self.templates[template])

    def _filled(self, text: str, values: Mapping[str, Any]) -> str:
        def piece(match: re.Match[str]) -> str:
            name = match[1]
            if name is None:
                return match[0][0]  # a brace, written twice
            if name in self.words:
                return self.words[name]
            if name in self.parts:
                part = self.parts[name]
                return self._filled(part.text if not part.when or values[part.when] else part.without, values)
            return values[name]

        return _PIECE.sub(piece, text)


def read(path: Path, shown: str) -> Mapping[str, Any]:
    """What a TOML file says. shown: what it is, in messages. Raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"{shown} cannot be read ({reason(error)}): give the path of a TOML file") from error
    except ValueError as error:  # of TOML's form, and of UTF-8
        raise UserError(f"{shown} is no TOML in UTF-8: {reason(error)}") from error


def checked(tree: Mapping[str, Any], shown: str, base: Wording | None = None) -> Wording:
    """The wording of a file's tree, laid over `base`.

    Raises:
      UserError: the first thing that is wrong: an unknown table or text, one that is missing, a name in braces that is
        unknown or missing, a single brace.
    """
    words: dict[str, str] = dict(base.words) if base else {}
    parts: dict[str, Part] = dict(base.parts) if base else {}
    templates: dict[str, str] = dict(base.templates) if base else {}
    for table, texts in tree.items():
        if table not in ("words", "parts", *_TABLES):
            _refuse(
                shown,
                f"the table [{table}] is unknown: {did_you_mean(str(table), ['words', 'parts', *sorted(_TABLES)])}",
            )
        if not isinstance(texts, Mapping):
            _refuse(shown, f"{table} must be a table of texts")
        for name, value in texts.items():
            where = f"{table}.{name}"
            if table == "parts":
                parts[_own_name(name, where, shown)] = _part(value, where, shown)
            elif table == "words":
                words[_own_name(name, where, shown)] = _text(value, where, shown)
            elif where in FORMS:
                templates[where] = _text(value, where, shown)
            else:
                own = [key.partition(".")[2] for key in FORMS if key.startswith(f"{table}.")]
                _refuse(shown, f"{where} is unknown: {did_you_mean(str(name), own)}")
    for name, form in FORMS.items():
        if not templates.get(name) and not form.optional:
            _refuse(shown, f"{name} is missing: give that text, or `extends` with a shipped set that has it")
        templates.setdefault(name, "")
    wording = Wording(words, parts, templates)
    for problem in _problems(wording):
        _refuse(shown, problem)
    return wording


def _problems(wording: Wording) -> Iterator[str]:
    if both := sorted(wording.words.keys() & wording.parts.keys()):
        yield f"{both[0]} is a word and a part: give one of them another name"
    for name, text in wording.words.items():
        if match := _NAME_ALONE.search(text):
            yield f"words.{name} holds {match[0]}, and words are plain: make a part of it, or leave the braces"
    for name, part in wording.parts.items():
        for text in (part.text, part.without):
            yield from _braces(f"parts.{name}", text)
        if part.when and part.when not in _KNOWN and part.when not in FLAGS:
            hint = did_you_mean(part.when, sorted({*_KNOWN, *FLAGS}))
            yield f"parts.{name} has when = {part.when!r}, unknown: {hint}"
    for name, part in wording.parts.items():
        yield from _names_problems(wording, f"parts.{name}", f"{part.text}{part.without}", _KNOWN, FLAGS)
        if name in _reached(wording, f"{part.text}{part.without}"):
            yield f"parts.{name} stands within itself"
    for name, form in FORMS.items():
        text = wording.templates[name]
        yield from _braces(name, text)
        yield from _names_problems(wording, name, text, form.knows, form.flags)
        has = _reached(wording, text) | _reached(wording, wording.templates.get(form.with_, ""))
        for names in form.needs:
            if has.isdisjoint(names):
                beside = f" or {form.with_}" if form.with_ else ""
                yield f"{name}{beside} must hold {' or '.join(f'{{{n}}}' for n in names)}, and does not"


def _braces(where: str, text: str) -> Iterator[str]:
    for match in _PIECE.finditer(text):
        if match[0] in ("{", "}"):
            near = text[max(0, match.start() - 12) : match.start() + 12]
            yield f"{where} has a single {match[0]} (at {near!r}): a brace itself is written twice, {match[0] * 2}"


def _names_problems(wording: Wording, where: str, text: str, knows: Any, flags: Any) -> Iterator[str]:
    """Names in a text, and in the parts that it has, that are not known where it stands."""
    for name in sorted(_reached(wording, text)):
        is_own = name in wording.words or name in wording.parts
        if is_own or name in knows:
            when = wording.parts[name].when if name in wording.parts else ""
            if when and when not in knows and when not in flags:
                yield f"{where} has {{{name}}}, which asks for {when!r}; that is not known there"
        elif name in FLAGS:
            yield f"{where} has {{{name}}}, which is no text: let a part have when = {name!r}"
        else:
            known = [*knows, *wording.words, *wording.parts]
            yield f"{where} has {{{name}}}, which is not known there: {did_you_mean(name, known)}"


def _reached(wording: Wording, text: str) -> set[str]:
    """All names that stand in a text and in the parts that it has."""
    reached: set[str] = set()
    waiting = [text]
    while waiting:
        for match in _PIECE.finditer(waiting.pop()):
            name = match[1]
            if name and name not in reached:
                reached.add(name)
                if part := wording.parts.get(name):
                    waiting += [part.text, part.without]
    return reached


def _part(value: Any, where: str, shown: str) -> Part:
    names = [field.name for field in dataclasses.fields(Part)]
    if not isinstance(value, Mapping):
        _refuse(shown, f"{where} must be a table: text, and if you like when and without")
    if other := [name for name in value if name not in names]:
        _refuse(shown, f"{where} has {other[0]!r}: a part has {', '.join(names)}")
    if "text" not in value:
        _refuse(shown, f"{where} has no text")
    return Part(**{name: _text(text, f"{where}.{name}", shown) for name, text in value.items()})


def _text(value: Any, where: str, shown: str) -> str:
    if not isinstance(value, str):
        _refuse(shown, f"{where} must be a text, in quotes")
    if not is_encodable(value):
        _refuse(shown, f"{where} holds half a character, which no tokenizer takes")
    return value


def _own_name(name: Any, where: str, shown: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        _refuse(shown, f"{where}: names are small letters, digits and _")
    if name in _KNOWN or name in FLAGS:
        _refuse(shown, f"{where} has the name of what is filled in: give it another one")
    return name


def _refuse(shown: str, problem: str) -> Any:
    raise UserError(f"{shown}: {problem}")
