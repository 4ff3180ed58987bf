# SPDX-License-Identifier: Apache-2.0

"""The people, things and tasks of the invented AppWorld root: none of it is of the benchmark.

Six scenarios of three tasks, over notes, money and alarms, of difficulty 1 to 3, with the reference solution and the
requirements of each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from textwrap import dedent, indent
from typing import Any


@dataclass(frozen=True)
class Person:
    """An invented person with an account in each app that the tasks use."""

    first_name: str
    last_name: str
    phone_number: str
    birthday: str
    sex: str

    @property
    def email(self) -> str:
        """Their address, the same in every app."""
        return f"{self.first_name}.{self.last_name}@example.com".lower()

    def password(self, app: str) -> str:
        """Their password in an app."""
        return f"{self.first_name}-{app}-5150".lower()


SUPERVISOR = Person("Ada", "Quill", "5550000001", "1990-02-03", "female")
OTHERS = (
    Person("Bo", "Tern", "5550000002", "1988-07-08", "male"),
    Person("Cleo", "Marsh", "5550000003", "1993-11-21", "female"),
)
APPS = ("simple_note", "venmo", "phone", "gmail", "todoist")
BALANCE = 500.0

CODES = {"Garage door": "4711", "Bike lock": "1302", "Pool locker": "9034"}
RECEIPTS = {
    "garden": (12, 7, 31, 5, 18, 9, 4),
    "car": (40, 15, 22, 60, 8, 13),
    "kitchen": (3, 14, 15, 92, 6, 53, 5, 8),
}
NOTES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    *((title, f"code: {code}", ("codes",)) for title, code in CODES.items()),
    *(
        (f"{tag.title()} receipt {number}", f"amount: {amount}", (tag,))
        for tag, amounts in RECEIPTS.items()
        for number, amount in enumerate(amounts, 1)
    ),
    ("Grocery list", "milk\nbread", ("lists",)),
    ("Packing list", "socks\ntorch", ("lists",)),
    ("Film list", "The Kite\nRiver Song", ("lists",)),
    ("Weekday plan", "wake up: 06:40", ("plans",)),
    ("Market plan", "wake up: 05:15", ("plans",)),
    ("Swim plan", "wake up: 07:25", ("plans",)),
)
ALARMS = (("Weekday", "07:00"), ("Market", "06:00"), ("Swim", "08:00"))


@dataclass(frozen=True)
class Requirement:
    """One test of a task: what it says, the code under `with test`, and whether doing nothing passes it."""

    text: str
    code: str
    no_op_passes: bool = False


@dataclass(frozen=True)
class Task:
    """instruction, as the agent reads it. solution: Python against `apis`. answer: to complete the task with."""

    instruction: str
    solution: str
    requirements: tuple[Requirement, ...]
    answer: Any = None
    private: dict[str, Any] = field(default_factory=dict)

    @property
    def evaluation(self) -> str:
        """The source of `evaluation.py`."""
        tests = "".join(
            f"with test('''\n{each.text}\n'''):\n{indent(each.code, '    ')}\n" for each in self.requirements
        )
        return (
            "import json\n\n\n"
            "def evaluate(test, public_data, private_data, main_user, models, ground_truth_answer):\n"
            "    ended = models.end.supervisor.Task.all()[0]\n" + indent(tests, "    ")
        )


@dataclass(frozen=True)
class Scenario:
    """Tasks that differ in details; `name` is the id before its last "_"."""

    name: str
    split: str
    difficulty: int
    tasks: tuple[Task, ...]


ANSWER = Requirement(
    "assert answers match.",
    "test.case(ended.status, '==', 'success')\ntest.answer(json.loads(ended.answer), ground_truth_answer)",
)
NO_CHANGE = Requirement("assert no model changes.", "test.case(models.changed_model_names(), '==', set())", True)


def _only(*names: str) -> Requirement:
    return Requirement(
        f"assert no model changes but of {', '.join(names)}.",
        f"test.case(models.changed_model_names() - {set(names)!r}, '==', set())",
        no_op_passes=True,
    )


def _records(model: str, added: int, updated: int, rest: str) -> Requirement:
    return Requirement(
        f"assert {added} added and {updated} updated in {model}, none removed, as private_data says.",
        f"added, updated, removed = models.changed_records({model!r})\n"
        f"test.case([len(added), len(updated), len(removed)], '==', [{added}, {updated}, 0])\n{rest}",
    )


def _login(app: str, name: str = "token") -> str:
    who = SUPERVISOR.phone_number if app == "phone" else SUPERVISOR.email
    return (
        f"accounts = apis.supervisor.show_account_passwords()\n"
        f"password = [a['password'] for a in accounts if a['account_name'] == '{app}'][0]\n"
        f"{name} = apis.{app}.login(username='{who}', password=password)['access_token']\n"
    )


def _code(title: str, code: str) -> Task:
    solution = _login("simple_note") + dedent(f"""\
        notes = apis.simple_note.search_notes(access_token=token, query='{title}')
        found = [note['note_id'] for note in notes if note['title'] == '{title}'][0]
        note = apis.simple_note.show_note(access_token=token, note_id=found)
        apis.supervisor.complete_task(answer=note['content'].split(': ')[1])
        """)
    instruction = f"What is the number in my Simple Note note titled '{title}'?"
    return Task(instruction, solution, (ANSWER, NO_CHANGE), code)


def _create(title: str, content: str) -> Task:
    solution = _login("simple_note") + dedent(f"""\
        apis.simple_note.create_note(access_token=token, title='{title}', content='{content}')
        apis.supervisor.complete_task()
        """)
    check = (
        "test.case(added[0].title, '==', private_data.title)\ntest.case(added[0].content, '==', private_data.content)"
    )
    requirements = (ANSWER, _only("simple_note.Note"), _records("simple_note.Note", 1, 0, check))
    private = {"title": title, "content": content}
    return Task(f"Create a Simple Note note '{title}' that says '{content}'.", solution, requirements, None, private)


def _extend(title: str, line: str) -> Task:
    solution = _login("simple_note") + dedent(f"""\
        notes = apis.simple_note.search_notes(access_token=token, query='{title}')
        found = [note['note_id'] for note in notes if note['title'] == '{title}'][0]
        content = apis.simple_note.show_note(access_token=token, note_id=found)['content']
        apis.simple_note.update_note(access_token=token, note_id=found, content=content + '\\n{line}')
        apis.supervisor.complete_task()
        """)
    check = (
        "test.case(updated[0].title, '==', private_data.title)\n"
        "test.case(updated[0].content.strip().splitlines(), '==', private_data.lines)"
    )
    requirements = (ANSWER, _only("simple_note.Note"), _records("simple_note.Note", 0, 1, check))
    before = next(content for name, content, _ in NOTES if name == title)
    private = {"title": title, "lines": [*before.splitlines(), line]}
    instruction = f"Put '{line}' on a new line at the end of my Simple Note note '{title}', and change nothing else."
    return Task(instruction, solution, requirements, None, private)


def _sum(tag: str, amounts: tuple[int, ...]) -> Task:
    solution = _login("simple_note") + dedent(f"""\
        total, page = 0, 0
        while notes := apis.simple_note.search_notes(access_token=token, tags=['{tag}'], page_index=page):
            for note in notes:
                content = apis.simple_note.show_note(access_token=token, note_id=note['note_id'])['content']
                total += int(content.split(': ')[1])
            page += 1
        apis.supervisor.complete_task(answer=total)
        """)
    instruction = f"What do the amounts in all my Simple Note notes tagged '{tag}' add up to?"
    return Task(instruction, solution, (ANSWER, NO_CHANGE), sum(amounts))


def _pay(to: Person, amount: float, words: str) -> Task:
    solution = _login("venmo") + dedent(f"""\
        people = apis.venmo.search_users(access_token=token, query='{to.first_name}')
        email = [person['email'] for person in people if person['first_name'] == '{to.first_name}'][0]
        apis.venmo.create_transaction(access_token=token, receiver_email=email, amount={amount}, description='{words}')
        apis.supervisor.complete_task()
        """)
    check = (
        "test.case(added[0].receiver.email, '==', private_data.email)\n"
        "test.case(added[0].amount, '==', private_data.amount)\n"
        "test.case(added[0].description, '==', private_data.description)"
    )
    allowed = _only("venmo.Transaction", "venmo.User", "venmo.Notification")
    requirements = (ANSWER, allowed, _records("venmo.Transaction", 1, 0, check))
    private = {"email": to.email, "amount": amount, "description": words}
    instruction = f"Send ${amount:g} to {to.first_name} on Venmo, from my balance, with the description '{words}'."
    return Task(instruction, solution, requirements, None, private)


def _alarm(label: str) -> Task:
    solution = (
        _login("simple_note", "notes_token")
        + _login("phone")
        + dedent(f"""\
        notes = apis.simple_note.search_notes(access_token=notes_token, query='{label} plan')
        found = [note['note_id'] for note in notes if note['title'] == '{label} plan'][0]
        plan = apis.simple_note.show_note(access_token=notes_token, note_id=found)['content']
        time = plan.split(': ')[1].strip()
        alarms = apis.phone.show_alarms(access_token=token)
        alarm = [each['alarm_id'] for each in alarms if each['label'] == '{label}'][0]
        apis.phone.update_alarm(access_token=token, alarm_id=alarm, time=time)
        apis.supervisor.complete_task()
        """)
    )
    check = (
        "test.case(updated[0].label, '==', private_data.label)\n"
        "test.case(updated[0].time, '==', private_data.time)\n"
        "test.case(models.changed_field_names('phone.Alarm', updated[0].id), '==', {'time'})"
    )
    requirements = (ANSWER, _only("phone.Alarm"), _records("phone.Alarm", 0, 1, check))
    plan = next(content for name, content, _ in NOTES if name == f"{label} plan")
    private = {"label": label, "time": plan.split(": ")[1]}
    instruction = f"Set my phone's alarm '{label}' to the time that my Simple Note note '{label} plan' names."
    return Task(instruction, solution, requirements, None, private)


BO, CLEO = OTHERS
SCENARIOS = (
    Scenario("inv1code", "train", 1, tuple(_code(*item) for item in CODES.items())),
    Scenario(
        "inv2make",
        "train",
        1,
        tuple(_create(*item) for item in (("Milk run", "by noon"), ("Paint", "two tins"), ("Song", "in G"))),
    ),
    Scenario(
        "inv3line",
        "dev",
        2,
        tuple(_extend(*item) for item in (("Grocery list", "eggs"), ("Packing list", "map"), ("Film list", "Ash"))),
    ),
    Scenario("inv4sum", "test_normal", 2, tuple(_sum(*item) for item in RECEIPTS.items())),
    Scenario(
        "inv5pay",
        "test_normal",
        2,
        tuple(_pay(*item) for item in ((BO, 12.5, "lunch"), (CLEO, 40.0, "tickets"), (BO, 7.0, "stamps"))),
    ),
    Scenario("inv6wake", "test_challenge", 3, tuple(_alarm(label) for label, _ in ALARMS)),
)
SPLITS = ("train", "dev", "test_normal", "test_challenge")
