"""`--mode=check` against its own environment and one that breaks the protocol."""

import itertools
import json
import re

import pytest

from hintsd_jax.check import check
from hintsd_jax.envs.base import Report, Start, StepResult
from hintsd_jax.envs.tool_env import ToolEnv, tool
from hintsd_jax.errors import UserError
from hintsd_jax.main import main
from tests.configs import smoke_config


def test_a_script_is_played_and_everything_shown(tmp_path, capsys):
    (tmp_path / "script.txt").write_text(
        '<tool_call>\n{"name": "find_files", "arguments": {"title": "x"}}\n</tool_call>\n---\n'
        '<tool_call>\n{"name": \n</tool_call>\n---\nDone.'
    )
    changes = {"check.script": str(tmp_path / "script.txt"), "check.rollouts": 1, "rollout.max_steps": 4}
    changes |= {"env.options.length": 3}  # two are closed by steps without a call
    changes |= {"rollout.context": 288, "batch.length_buckets": (288,), "hindsight.context": 400}
    assert check(smoke_config(tmp_path / "data", changes))
    out = capsys.readouterr().out
    for text in (
        "--- read as find_files(title='x')",
        "which the agent is told:",
        "--- read as plain text, without a call",
        "--- step 4: the script wrote 1 tokens",  # after the script: nothing but the stop token
        "<|im_start|>user\n<tool_response>",
        "--- report (PRIVILEGED: knows the ground truth, never shown to the policy)",
        "--- ended: max_steps",
        "1 of 1 episodes were played; the environment kept to the protocol",
    ):
        assert text in out, text
    with pytest.raises(UserError, match="check.script = .*cannot be read"):
        check(smoke_config(tmp_path / "data", {"check.script": str(tmp_path)}))


class Breaks(ToolEnv):
    """Its tool fails where it is called at once; what was played before is shown all the same."""

    @classmethod
    def tasks(cls, split, data_dir):
        return [{"id": "only"}]

    def begin(self, task):
        return "Read it."

    @tool
    def read(self, text: str):
        """Reads JSON."""
        return json.loads(text)

    def reward(self):
        return 0.0


def test_an_environment_that_never_plays_is_shown_up_to_its_failure(tmp_path, capsys):
    (tmp_path / "script.txt").write_text('<tool_call>\n{"name": "read", "arguments": {"text": "?"}}\n</tool_call>')
    script = f"--config.check.script={tmp_path / 'script.txt'}"
    flags = ["--config=desk_smoke", f"--config.env.name={__name__}:Breaks", script, "--config.check.rollouts=1"]
    assert main(["check", *flags]) == 2
    said = capsys.readouterr()
    assert "Read it." in said.out and "--- read as read(text='?')" in said.out and "Traceback" in said.out
    where = r" 1 of task only: env_error: JSONDecodeError: .* \(test_check.py, line \d+, in read\)"
    assert re.search("first in step" + where, said.err) and re.search("PROBLEM in step" + where, said.out)


class Random:
    """Begins differently each time, and its report is none."""

    isolation, numbers = "thread", itertools.count()

    def __init__(self, **options): ...

    @classmethod
    def tasks(cls, split, data_dir, **options):
        return [{"id": "only"}]

    def reset(self, task):
        return Start(({"role": "user", "content": f"Number {next(self.numbers)}."},))

    def step(self, action):
        return StepResult((), terminated=True)

    def report(self):
        return "fine" if next(self.numbers) % 2 else Report("fine")

    def close(self): ...


def test_what_breaks_the_protocol_is_named(tmp_path, capsys):
    flags = {"env.name": f"{__name__}:Random", "env.data_dir": tmp_path, "check.rollouts": 3}
    assert main(["check", "--config=desk_smoke", *(f"--config.{name}={value}" for name, value in flags.items())]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM in report of task only: env_error: ProtocolError: report returned str, not a Report" in out
    assert "PROBLEM: two resets of task only began differently" in out
    assert "3 of 3 episodes were played; mend what stands above" in out
