# SPDX-License-Identifier: Apache-2.0

"""The words between AppWorld and an agent: a task's facts, outputs and problems in, messages out.

ReAct with code: a short thought and one Python block a step, and the block's output in a user message. The wording and
the worked example are our own; no task, person or note of the benchmark is in them.
"""

from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.appworld.client import WorkerFailed
from hintsd_jax.envs.base import Message
from hintsd_jax.envs.code_blocks import write_block
from hintsd_jax.texts import encodable

SYSTEM = """\
You do tasks for a person, your supervisor, by writing Python code against the APIs of their apps. You work on your \
own: nobody answers questions.

How it goes, step by step:
- Write a short thought, then exactly one block of code: a line ```python, the code, a line ```. Then stop. The next \
message is what the code printed. Write one small block, look at what it prints, then go on; never guess an output.
- Variables stay from one block to the next, as in a notebook. Print what you want to see. The object `apis` is there \
already; an API is called with keyword arguments only: apis.APP.API(NAME=VALUE).

What to know:
- Read the documentation before you call an API for the first time:
  print(apis.api_docs.show_app_descriptions())
  print(apis.api_docs.show_api_descriptions(app_name='APP'))
  print(apis.api_docs.show_api_doc(app_name='APP', api_name='API'))
- The app `supervisor` knows your supervisor: their profile, addresses, payment cards, and the passwords of their \
accounts (apis.supervisor.show_account_passwords()). Most apps want a login first, whose access_token their other APIs \
take. The username is the supervisor's e-mail address, or their phone number in the app `phone`.
- Lists come in pages: ask for page_index 0, 1, 2, ... until a page is empty. Look everything up; take no name, date \
or amount for granted. Change nothing that the task does not ask for.
- When all is done, call apis.supervisor.complete_task(). Where the task asks for something, give it, and nothing \
but it: apis.supervisor.complete_task(answer=...). That ends the task, so do it once, at the very end. If it cannot be \
done, apis.supervisor.complete_task(status='fail').

An example, of another task and with an invented app: "How many stamps from Malta are in my Album Keeper collection?"

I look up what the app offers.
```python
print(apis.api_docs.show_api_descriptions(app_name='album_keeper'))
```

Output:
```
[{"name": "login", ...}, {"name": "list_stamps", "description": "The stamps of your collection, in pages."}]
```

I need to know how to log in and what list_stamps takes.
```python
print(apis.api_docs.show_api_doc(app_name='album_keeper', api_name='login'))
print(apis.api_docs.show_api_doc(app_name='album_keeper', api_name='list_stamps'))
print([entry['account_name'] for entry in apis.supervisor.show_account_passwords()])
```

Output:
```
{"parameters": [{"name": "username", ...}, {"name": "password", ...}], ...}
{"parameters": [{"name": "access_token", ...}, {"name": "page_index", ...}], ...}
['album_keeper', 'phone']
```

I log in and count over all pages.
```python
passwords = {entry['account_name']: entry['password'] for entry in apis.supervisor.show_account_passwords()}
me = apis.supervisor.show_profile()
token = apis.album_keeper.login(username=me['email'], password=passwords['album_keeper'])['access_token']
stamps, page = [], 0
while more := apis.album_keeper.list_stamps(access_token=token, page_index=page):
    stamps += more
    page += 1
print(len(stamps), stamps[:1])
print(sum(stamp['country'] == 'Malta' for stamp in stamps))
```

Output:
```
43 [{"stamp_id": 7, "country": "Oman", "year": 1971}]
6
```

All 43 stamps were counted: 6 are from Malta.
```python
apis.supervisor.complete_task(answer=6)
```"""


def first_messages(started: Any) -> tuple[Message, ...]:
    """How an episode begins. started: the answer to `/initialize`.

    Raises:
      WorkerFailed: it lacks something, or holds no text.
    """
    supervisor = started.get("supervisor") if isinstance(started, Mapping) else None
    supervisor = supervisor if isinstance(supervisor, Mapping) else {}
    names = ("first_name", "last_name", "email", "phone_number")
    facts = [supervisor.get(name) for name in names]
    facts += [started.get(name) for name in ("datetime", "instruction")] if isinstance(started, Mapping) else [None]
    if not all(isinstance(fact, str) for fact in facts):
        raise WorkerFailed("the start of a world lacks the supervisor, the date or the task")
    first, last, email, phone, now, instruction = facts
    text = (
        f"Your supervisor is {first} {last}, e-mail address {email}, phone number {phone}. It is now {now}.\n\n"
        f"The task: {instruction}"
    )
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": encodable(text)})


def output_message(output: str, max_chars: int) -> Message:
    """What an action's code printed, cut with a note."""
    text = encodable(output[:max_chars]).rstrip("\n")
    if len(output) > max_chars:
        text += f"\n... [cut: the first {max_chars:,} of {len(output):,} characters; print less at once]"
    return {"role": "user", "content": f"Output:\n```\n{text}\n```"}


def problem_message(problem: str) -> Message:
    """What an agent is told whose action holds no code that can be run."""
    return {"role": "user", "content": f"Nothing was run: {problem}."}


def render_code(thought: str, code: str) -> str:
    """An action as `SYSTEM` asks for it."""
    return f"{thought}\n{write_block(code)}"
