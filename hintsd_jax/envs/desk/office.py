# SPDX-License-Identifier: Apache-2.0

"""The simulated office: tool calls in, one line of text out, and a state of JSON values that lasts for the episode.

Look-ups are harmless and may be repeated. Every other tool leaves an entry in the `ledger` (hour, tool, arguments) and
changes the state for good: there is no undo, nothing may be done twice, and the office accepts whatever exists. So a
wrong choice is answered with "Ok." and shows only later: in the final state, and where the thing is looked up again.
The hour is the index of the user's request.

Look-ups show what is there now, with its label: what was deleted, cancelled, archived or booked is gone from where it
was listed, and a booked slot, a forwarded mail, a copy and an address that a file went to are found under the name that
they were given.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from hintsd_jax.envs.base import CallError

LOOKUPS: dict[str, tuple[str, ...]] = {
    "find_files": ("title",),
    "list_sizes": ("title",),
    "find_contact": ("name",),
    "search_mail": ("sender",),
    "free_slots": ("day",),
    "find_events": ("title",),
    "read_file": ("file",),
}
EFFECTS: dict[str, tuple[str, ...]] = {
    "copy_file": ("file", "to"),
    "delete_file": ("file",),
    "send_file": ("to", "file"),
    "forward_mail": ("mail", "to"),
    "archive_mail": ("mail",),
    "book_slot": ("slot", "title"),
    "cancel_event": ("event",),
    "add_contact": ("name", "address"),
    "notify": ("name",),
}
PARAMETERS = {**LOOKUPS, **EFFECTS}
PROBLEMS = {
    "file": "no such file",
    "mail": "no such mail",
    "slot": "no such slot",
    "event": "no such event",
    "taken": "name is taken",
    "nothing": "found nothing",
}

_DESCRIPTIONS = {
    "find_files": "Versions of a file.",
    "list_sizes": "Sizes of a file's copies.",
    "find_contact": "Addresses of a person.",
    "search_mail": "Mails of a sender.",
    "free_slots": "Free slots of a day.",
    "find_events": "Events of a title.",
    "read_file": "A file's text.",
    "copy_file": "Copy a file to a new name.",
    "delete_file": "Delete a file.",
    "send_file": "Send to an address a file.",
    "forward_mail": "Forward a mail.",
    "archive_mail": "Archive a mail.",
    "book_slot": "Book a slot.",
    "cancel_event": "Cancel an event.",
    "add_contact": "Add a person.",
    "notify": "Notify a person.",
}


def tool_docs() -> tuple[dict, ...]:
    """The tools in the function-calling format that chat templates expect."""
    return tuple(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": _DESCRIPTIONS[name],
                "parameters": {
                    "type": "object",
                    "properties": {p: {"type": "string"} for p in parameters},
                    "required": list(parameters),
                },
            },
        }
        for name, parameters in PARAMETERS.items()
    )


@dataclasses.dataclass
class Office:
    """The state of one office.

    listings: for each look-up tool and key, the labelled candidates that the tool shows: `{"find_files": {"report":
    [["draft", "a"], ["final", "b"]]}}`; a value without a label has the label "". files: file -> its text, which is its
    own first name: a copy keeps it. ledger: `[hour, tool, {argument: value}, content]` of every effect. The rest is
    what the effects change.
    """

    listings: dict[str, dict[str, list[list[str]]]]
    files: dict[str, str]
    mails: list[str]
    slots: list[str]
    events: list[str]
    contacts: dict[str, str]
    hour: int = 0
    ledger: list[list[Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def from_json(cls, state: dict) -> Office:
        return cls(**_copy(state))

    def to_json(self) -> dict:
        return _copy(vars(self))

    def clone(self) -> Office:
        return Office(**self.to_json())

    def final_state(self) -> dict:
        """What the outcome is decided by: everything but the clock; the order inside one hour does not count."""
        state = self.to_json()
        state.pop("hour")
        state["ledger"] = sorted(state["ledger"], key=repr)
        return state

    def call(self, tool: str, arguments: dict[str, Any]) -> str:
        """Carries out one call and returns the observation.

        Raises:
          CallError: it cannot be carried out; the state is unchanged.
        """
        if tool not in PARAMETERS:
            raise CallError(f"no tool {tool!r}")
        if set(arguments) != set(PARAMETERS[tool]):
            raise CallError(f"{tool} takes {', '.join(PARAMETERS[tool])}")
        if not all(isinstance(value, str) for value in arguments.values()):
            raise CallError(f"{tool} takes strings")
        if tool in LOOKUPS:
            return self._look_up(tool, *arguments.values())
        self._change(tool, arguments)
        return "Ok."

    def _look_up(self, tool: str, key: str) -> str:
        if tool == "read_file":
            if key not in self.files:
                raise CallError(PROBLEMS["file"])
            candidates = [[self._label(self.files[key]), self.files[key]]]
        else:
            candidates = self.listings.get(tool, {}).get(key)
        if not candidates:
            raise CallError(PROBLEMS["nothing"])
        return "Found " + ", ".join(f'{label} "{value}"'.lstrip() for label, value in candidates) + "."

    def _label(self, value: str) -> str:
        """The label that some look-up shows a value with, or "" where none does."""
        labels = (
            label
            for listing in self.listings.values()
            for shown in listing.values()
            for label, v in shown
            if v == value
        )
        return next(labels, "")

    def _list(self, tool: str, key: str, value: str) -> None:
        """From now on the look-up finds the value under `key` too."""
        self.listings.setdefault(tool, {}).setdefault(key, []).append([self._label(value), value])

    def _unlist(self, value: str, *tools: str) -> None:
        """From now on these look-ups do not find the value."""
        for tool in tools:
            listing = self.listings.get(tool, {})
            listing.update({key: [each for each in shown if each[1] != value] for key, shown in listing.items()})

    def _change(self, tool: str, arguments: dict[str, str]) -> None:
        content = None
        match tool:
            case "copy_file":
                self._require(arguments["file"] in self.files, "file")
                self._require(arguments["to"] not in self.files, "taken")
                content = self.files[arguments["to"]] = self.files[arguments["file"]]
            case "delete_file":
                self._require(arguments["file"] in self.files, "file")
                content = self.files.pop(arguments["file"])
                self._unlist(arguments["file"], "find_files", "list_sizes")
            case "send_file":
                self._require(arguments["file"] in self.files, "file")
                content = self.files[arguments["file"]]
                self._list("find_contact", arguments["file"], arguments["to"])
            case "forward_mail":
                self._require(arguments["mail"] in self.mails, "mail")
                self._list("search_mail", arguments["to"], arguments["mail"])
            case "archive_mail":
                self._require(arguments["mail"] in self.mails, "mail")
                self.mails.remove(arguments["mail"])
                self._unlist(arguments["mail"], "search_mail")
            case "book_slot":
                self._require(arguments["slot"] in self.slots, "slot")
                self.slots.remove(arguments["slot"])
                self._list("find_events", arguments["title"], arguments["slot"])
                self._unlist(arguments["slot"], "free_slots")
            case "cancel_event":
                self._require(arguments["event"] in self.events, "event")
                self.events.remove(arguments["event"])
                self._unlist(arguments["event"], "find_events")
            case "add_contact":
                self._require(arguments["name"] not in self.contacts, "taken")
                self.contacts[arguments["name"]] = arguments["address"]
            case "notify":
                pass  # anyone may be notified
        self.ledger.append([self.hour, tool, dict(arguments), content])

    @staticmethod
    def _require(condition: bool, problem: str) -> None:
        if not condition:
            raise CallError(PROBLEMS[problem])


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of JSON values; several times faster than `copy.deepcopy`."""
    return json.loads(json.dumps(state))
