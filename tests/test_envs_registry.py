"""The environment registry: names, paths, and one clear line for each mistake."""

import sys
import types

import pytest

from hintsd_jax import library
from hintsd_jax.config.build import build
from hintsd_jax.envs import registry
from hintsd_jax.envs.base import Environment, Report, Start, StepResult
from hintsd_jax.envs.registry import register, resolve, whole
from hintsd_jax.errors import UserError
from hintsd_jax.main import cli


class Echo:
    """The smallest environment."""

    @classmethod
    def tasks(cls, split, data_dir, **options):
        return [{"id": f"{split}-0"}]

    def reset(self, task):
        return Start(({"role": "user", "content": "say it"},))

    def step(self, action):
        return StepResult((), reward=1.0, terminated=True)

    def report(self):
        return Report("nothing to say")

    def close(self):
        pass


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_PATHS", dict(registry._PATHS))
    module = types.ModuleType("an_environment_module")
    module.Echo, module.Half, module.number = Echo, type("Half", (), {"reset": Echo.reset, "step": Echo.step}), 3
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_path_and_a_registered_name_give_the_class():
    assert resolve("an_environment_module:Echo") is Echo
    register("echo", "an_environment_module:Echo")
    register("echo", "an_environment_module:Echo")  # the same again is no conflict
    assert resolve("echo") is Echo
    assert isinstance(Echo(), Environment)


@pytest.mark.parametrize(
    "given, name, options",
    [
        ("verifiers:my-taskset", "verifiers", {"taskset": "my-taskset"}),
        ("openenv:https://there.example:8000/a", "openenv", {"environment": "https://there.example:8000/a"}),
        ("openenv:my_env.server.app:app", "openenv", {"environment": "my_env.server.app:app"}),
        ("desk:Desk", "desk:Desk", {}),  # a module of the user's that is called so
        ("verifiers", "verifiers", {}),
    ],
)
def test_a_name_may_say_what_another_package_is_to_play(given, name, options):
    assert whole(given, {"seed": 3}) == (name, {"seed": 3, **options})
    assert whole(given, options) == (name, options)
    config, own = build(library.load_config("verifiers", {"env.name": given})), {"size": 1000, "seed": 0}
    assert config.env.name == name and config.env.options.items() >= options.items()
    assert (config.env.options.items() >= own.items()) == (name == "verifiers")


def test_a_name_and_an_option_that_say_otherwise_are_refused():
    with pytest.raises(UserError, match="'verifiers:a', but env.options.taskset = 'b': give one of the two"):
        whole("verifiers:a", {"taskset": "b"})
    with pytest.raises(UserError, match="name the environment after the colon"):
        whole("openenv:", {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dsk", "did you mean 'desk'"),
        ("zzzz", "choose one of appworld, bfcl, desk"),
        ("no_such_module_at_all:X", "cannot import 'no_such_module_at_all'"),
        ("an_environment_module:Missing", "has no 'Missing'"),
        ("an_environment_module:number", "is int, not a class"),
        ("an_environment_module:Half", "lacks tasks, report, close"),
        ("not a module:X", "'package.module:name'"),
        ("a.b:", "'package.module:name'"),
        (":X", "'package.module:name'"),
    ],
)
def test_mistakes_are_one_clear_line(name, message):
    with pytest.raises(UserError) as error:
        resolve(name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_finds_an_environment_where_it_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "lies_beside_it.py").write_text("number = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    flags = ["--config=desk_smoke", "--workdir=run", "--config.env.name=lies_beside_it:number"]
    monkeypatch.setattr(sys, "argv", ["hintsd-jax", "train", *flags])
    with pytest.raises(SystemExit) as end:
        cli()
    assert end.value.code == 2 and "'lies_beside_it:number' is int, not a class" in capsys.readouterr().err


def test_a_name_is_not_taken_twice():
    with pytest.raises(UserError, match="already stands for"):
        register("desk", "an_environment_module:Echo")
    with pytest.raises(UserError, match="without a colon"):
        register("a:b", "an_environment_module:Echo")
    with pytest.raises(UserError, match="package.module:Class"):
        register("echo", "an_environment_module")


def test_a_module_that_breaks_at_import_is_named(tmp_path, monkeypatch):
    (tmp_path / "breaks_at_import.py").write_text("raise ZeroDivisionError('in there')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="breaks_at_import.*ZeroDivisionError: in there"):
        resolve("breaks_at_import:X")
