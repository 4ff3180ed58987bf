# SPDX-License-Identifier: Apache-2.0

"""Builds an AppWorld root with an invented world, out of the appworld package alone: people, notes, money, alarms and
18 tasks with reference solutions and evaluations. The real engine runs on it as on the benchmark's own data.

For AppWorld's own environment (`make appworld`):

    .cache/appworld-venv/bin/python -m benchmarks.appworld_root --out=.cache/appworld-root

A folder that exists is refused: it might hold the benchmark's data.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.appworld_scenarios import (
    ALARMS,
    APPS,
    BALANCE,
    NOTES,
    OTHERS,
    SCENARIOS,
    SPLITS,
    SUPERVISOR,
    Person,
    Scenario,
    Task,
)

NOW = (2023, 5, 18, 12, 0, 0)


def build(root: Path) -> list[str]:
    """Writes the root; returns the ids of its tasks."""
    os.environ["APPWORLD_ROOT"] = str(root)
    from appworld.apps import get_all_apps  # pyright: ignore[reportMissingImports] - the second environment has it
    from appworld.apps.api_lib import set_local_date_and_time  # pyright: ignore[reportMissingImports] - as above
    from appworld.common.constants import DB_VERSION  # pyright: ignore[reportMissingImports] - as above
    from appworld.common.datetime import DateTime  # pyright: ignore[reportMissingImports] - as above

    data = root / "data"
    for name in ("base_dbs", "datasets", "api_docs/standard", "tasks"):
        (data / name).mkdir(parents=True)
    freezer = set_local_date_and_time(DateTime(*NOW))
    _write_docs(data / "api_docs" / "standard", get_all_apps(skip_admin=True))
    _write_base(data / "base_dbs", get_all_apps(), get_all_apps(skip_admin=True))
    ids: dict[str, list[str]] = {split: [] for split in SPLITS}
    for scenario in SCENARIOS:
        for number, task in enumerate(scenario.tasks, 1):
            task_id = f"{scenario.name}_{number}"
            _write_task(data / "tasks" / task_id, task_id, task, scenario, DB_VERSION)
            ids[scenario.split].append(task_id)
    for split, names in ids.items():
        (data / "datasets" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    (data / "version.txt").write_text(DB_VERSION)
    freezer.stop()
    return [name for names in ids.values() for name in names]


def _write_docs(folder: Path, apps: list[str]) -> None:
    from appworld.collections.api_docs import ApiDocCollection  # pyright: ignore[reportMissingImports] - as above
    from appworld.common.constants import CANARY_STRING  # pyright: ignore[reportMissingImports] - as above

    for app, docs in ApiDocCollection.build(load_apps=tuple(apps)).items():
        marked = {name: {**dict(doc), "canary_string": CANARY_STRING} for name, doc in docs.items()}
        (folder / f"{app}.json").write_text(json.dumps(marked))


def _write_base(folder: Path, apps: list[str], public: list[str]) -> None:
    """The databases that every task starts from."""
    from appworld.api_docs import prepare_api_docs  # pyright: ignore[reportMissingImports] - as above
    from appworld.apps.api_lib import clear_local_dbs_cache  # pyright: ignore[reportMissingImports] - as above
    from appworld.apps.model_lib import (  # pyright: ignore[reportMissingImports] - as above
        get_cached_db_engine,
        get_db_home_path,
        get_direct_cached_sqlite3_connection,
    )
    from appworld.collections.models import ModelCollection  # pyright: ignore[reportMissingImports] - as above

    models = ModelCollection.load(
        to_db_home_path=get_db_home_path("memory", "base"),
        from_db_home_path=str(folder),
        load_apps=[],
        force_empty_apps=apps,
        create_db=True,
    )
    for person in (SUPERVISOR, *OTHERS):
        _add_person(models, person)
    notes, phone = models.simple_note, models.phone
    owner = notes.User.find_one(email=SUPERVISOR.email).id
    for title, content, tags in NOTES:
        notes.Note.create_save(user_id=owner, title=title, content=content, tags=list(tags), pinned=False)
    owner = phone.User.find_one(phone_number=SUPERVISOR.phone_number).id
    for label, time in ALARMS:
        phone.Alarm.create_save(user_id=owner, label=label, time=time, enabled=True, repeat_days=[], vibration=False)
    for app in public:
        for described in prepare_api_docs(app, include_private_apis=False):
            doc = copy.deepcopy(described)
            doc["app_name_"] = doc.pop("app_name")
            models.api_docs.ApiDoc.create_save(**doc)
    models.save(str(folder), format="full", delete_if_exists=True, vaccum=True)
    models.close()
    # What still points to the files before they were saved.
    clear_local_dbs_cache()
    get_cached_db_engine.cache_clear()
    get_direct_cached_sqlite3_connection.cache_clear()


def _add_person(models: Any, person: Person) -> None:
    named = {"first_name": person.first_name, "last_name": person.last_name}
    told = {"birthday": person.birthday, "sex": person.sex, "phone_number": person.phone_number}
    main = models.admin.MainUser.create_save(**named, email=person.email, **told)
    for app in APPS:
        password = person.password(app)
        models.admin.AccountPassword.create_save(main_user_id=main.id, account_name=app, password=password)
        account: dict[str, Any] = named | {"password": password}
        if app == "phone":
            account["phone_number"] = person.phone_number
        else:
            account |= {"email": person.email, "verified": True}
        if app == "venmo":
            account["venmo_balance"] = BALANCE
        models[app].User.create_save(**account)


def _write_task(folder: Path, task_id: str, task: Task, scenario: Scenario, db_version: str) -> None:
    from appworld.apps import get_all_apps  # pyright: ignore[reportMissingImports] - as above
    from appworld.apps.model_lib import get_db_home_path  # pyright: ignore[reportMissingImports] - as above
    from appworld.collections.models import ModelCollection  # pyright: ignore[reportMissingImports] - as above
    from appworld.common.constants import CANARY_STRING  # pyright: ignore[reportMissingImports] - as above
    from appworld.common.datetime import DateTime  # pyright: ignore[reportMissingImports] - as above

    truth = folder / "ground_truth"
    truth.mkdir(parents=True)
    named = {"first_name": SUPERVISOR.first_name, "last_name": SUPERVISOR.last_name, "email": SUPERVISOR.email}
    named["phone_number"] = SUPERVISOR.phone_number
    specs = {"instruction": task.instruction, "supervisor": named, "datetime": DateTime(*NOW).isoformat()}
    _dump(folder / "specs.json", specs | {"db_version": db_version, "canary_string": CANARY_STRING})
    apps = [*get_all_apps(skip_admin=True), "admin"]
    models = ModelCollection.load(
        to_db_home_path=get_db_home_path("memory", "task_input", task_id=task_id),
        from_db_home_path=get_db_home_path("disk", "base"),
        load_apps=apps,
    )
    told = {"birthday": SUPERVISOR.birthday, "sex": SUPERVISOR.sex}
    supervisor = models.supervisor.Supervisor.create_save(**named, **told)
    for app in APPS:
        models.supervisor.AccountPassword.create_save(
            supervisor_id=supervisor.id, account_name=app, password=SUPERVISOR.password(app)
        )
    models.supervisor.Task.create_save(supervisor_id=supervisor.id, instruction=task.instruction)
    models.save(str(folder / "dbs"), format="changes", app_names=apps, delete_if_exists=True)
    models.close()
    labels = {True: "no_op_pass", False: "no_op_fail"}
    tests = [{"requirement": each.text, "label": labels[each.no_op_passes]} for each in task.requirements]
    metadata = {"difficulty": scenario.difficulty, "mode": "minimal", "num_apps": 1, "num_apis": 3}
    metadata |= {"num_api_calls": 4, "num_solution_code_lines": len(task.solution.splitlines())}
    _dump(truth / "public_data.json", {})
    _dump(truth / "private_data.json", task.private)
    _dump(truth / "answer.json", task.answer)
    _dump(truth / "test_data.json", tests)
    _dump(truth / "metadata.json", metadata)
    (truth / "evaluation.py").write_text(task.evaluation)
    body = "".join(f"    {line}\n" for line in task.solution.splitlines())
    (truth / "compiled_solution.py").write_text(f"def solution(apis, requester):\n{body}")


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def main() -> int:
    """Builds the root in a folder beside its place, and moves it there once it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    out = parser.parse_args().out.absolute()
    if out.exists():
        print(f"error: {out} exists: it is left alone; give another --out", file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the engine warns of every table that is empty
            ids = build(building)
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(f"{out}: {len(ids)} tasks in {len(SCENARIOS)} scenarios")
    return 0


if __name__ == "__main__":
    sys.exit(main())
