# SPDX-License-Identifier: Apache-2.0

"""What an agent is told before the first request: the options of the environment go in; the system prompt and the
documented tools come out.

Invariant: neither says which candidate is right. Of a task only the names of its tools show (tools = "relevant").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.desk.office import tool_docs
from hintsd_jax.errors import UserError
from hintsd_jax.texts import did_you_mean

SHORT = "You run an office. Do each request, then say Done."
# For a model that has not been trained on Desk.
FULL = (
    "You run an office through its tools. The user makes one request after the other.\n"
    "A request names files, mails, slots, events and people by a title or a name, while the tools that change"
    " something take the name of one candidate. So look up first: find_files, list_sizes, find_contact, search_mail,"
    ' free_slots and find_events answer with labelled candidates, such as: Found draft "a", final "b". The label'
    ' that the request asks for tells which name to pass on: "b" for the final one, "a" for not the final one. A'
    " request to see or to read something is a look-up as well, of a file's text by read_file. Names that the request"
    " itself gives for something new, or for whoever receives it, are passed on as they are.\n"
    "Make one tool call at a time, and each call once: nothing can be undone. Do all that the request asks for and"
    " nothing else. When it is done, answer Done. without any tool call, and the next request comes."
)
INSTRUCTIONS = {"short": SHORT, "full": FULL}
TOOLS = ("all", "relevant")


def check(instructions: str, tools: str) -> None:
    """Raises UserError where there are no such instructions, or no such choice of tools."""
    for name, value, known in (("instructions", instructions, INSTRUCTIONS), ("tools", tools, TOOLS)):
        if value not in known:
            raise UserError(f"env.options.{name} = {value!r} is unknown: {did_you_mean(str(value), known)}")


def documented_tools(task: Mapping[str, Any], tools: str) -> tuple[dict, ...]:
    """All tools, or those that the reference of some request of the task calls; always in the order of the office."""
    if tools == "all":
        return tool_docs()
    requests = task["requests"]
    needed = {call[0] for request in requests for call in (*request["calls"], request["lookup"]) if call}
    return tuple(doc for doc in tool_docs() if doc["function"]["name"] in needed)
