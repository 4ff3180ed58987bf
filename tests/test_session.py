"""What a run is made of: task order, and the mistakes of a user that only show when the parts meet."""

import dataclasses
import json
import shutil
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import pytest

from hintsd_jax.checkpoints.huggingface import load_policy, save_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.base import Report, Start, StepResult
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.errors import UserError
from hintsd_jax.session import Session, step_tasks
from tests.configs import POLICY, smoke_config

LONG = True  # see conftest.py


def desk_config(tmp_path, **overrides):
    return smoke_config(tmp_path / "data", overrides)


def test_task_order_is_epochs_of_shuffles_without_a_gap():
    tasks = [{"id": str(n)} for n in range(10)]
    order = [task["id"] for step in range(10) for task in step_tasks(tasks, seed=3, step=step, count=4)]
    for epoch in range(4):
        assert Counter(order[10 * epoch : 10 * epoch + 10]) == Counter(str(n) for n in range(10))
    assert order[:10] != order[10:20]
    assert step_tasks(tasks, 3, 7, 4) == step_tasks(tasks, 3, 7, 4) != step_tasks(tasks, 4, 7, 4)


def test_more_tasks_a_step_than_tasks():
    assert len(step_tasks([{"id": "only"}], 0, 5, 3)) == 3


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"env.name": "dekc"}, "did you mean 'desk'"),
        ({"env.name": "no.such.module:Env"}, "cannot import"),
        ({"policy.path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"rollout.context": 10**6, "batch.length_buckets": (), "hindsight.context": 0}, "exceeds the 16384 positions"),
        ({"mesh.data": 3}, "mesh.data = 3.* do not multiply to the 1 devices"),
        ({"mesh.fsdp": 0}, "mesh.fsdp = 0, mesh.tensor = 1: sizes are at least 1"),
        ({"lora.rank": 4, "lora.targets": ("query",)}, "lora.targets.*q_proj"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        Session.open(desk_config(tmp_path, **overrides))


def test_unknown_options_and_impossible_tasks_are_refused(tmp_path):
    config = desk_config(tmp_path, **{"env.options": {"sead": 0}})
    with pytest.raises(UserError, match="env.options.sead: environment 'desk' has no such option; did you mean 'seed'"):
        Session.open(config).tasks("train")


class Odd(Desk):
    """Its tasks hold what JSON cannot, and one of them itself."""

    ring: ClassVar[list] = []

    @classmethod
    def tasks(cls, split, data_dir):
        return [
            {"id": "a", "any": {object(), "b", 3}, ("t",): 1, "bytes": b"x", "nan": float("nan"), "half": "\ud800"},
            {"id": "b", "ring": cls.ring},
        ]


def test_the_digest_of_tasks_is_the_same_wherever_it_is_made(tmp_path):
    Odd.ring.append(Odd.ring)
    config = desk_config(tmp_path, **{"env.name": f"{__name__}:Odd", "env.options": {}, "eval.test_tasks": 2})
    digests = {dataclasses.replace(session).tasks_digest for session in [Session.open(config)] * 2}
    assert len(digests) == 1
    fewer = config.replaced({"eval.test_tasks": 1})
    assert dataclasses.replace(Session.open(config), config=fewer).tasks_digest not in digests


def test_a_vocabulary_that_does_not_match_is_refused(tmp_path):
    config, params = load_policy(POLICY)
    small = params | {"embed": {"embedding": params["embed"]["embedding"][:300]}}
    save_policy(tmp_path / "small", dataclasses.replace(config, vocab_size=300), small, load_tokenizer(POLICY))
    with pytest.raises(UserError, match="only 300 entries"):
        Session.open(desk_config(tmp_path, **{"policy.path": str(tmp_path / "small")}))


def test_the_chat_follows_checkpoint_and_config(tmp_path):
    folder = shutil.copytree(POLICY, tmp_path / "policy")
    ids = {
        token: load_tokenizer(POLICY).convert_tokens_to_ids(token)
        for token in ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
    }
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [ids["<|endoftext|>"], ids["<|im_end|>"]]})
    )
    template = folder / "chat_template.jinja"
    template.write_text(
        template.read_text().replace(
            "'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n' ~ (enable_thinking, mood) }}"
        )
    )
    changes = {
        "policy.path": str(folder),
        "chat.enable_thinking": False,
        "chat.history": "template",
        "chat.template_kwargs": {"mood": "calm"},
    }
    config = desk_config(tmp_path, **changes)
    chat = Session.open(config).chat
    assert chat.stop_ids == (ids["<|im_end|>"], ids["<|endoftext|>"]) and chat.deviation is None
    prompt = chat.prompt([{"role": "user", "content": "Go."}])
    assert chat.decode(prompt.ids[prompt.prompt_start :]).endswith("(False, 'calm')")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 128_009}))
    with pytest.raises(
        UserError, match="generation_config.json ends a generation with token 128009, but the tokenizer has only"
    ):
        Session.open(config)


@pytest.mark.parametrize("rank", [0, 4])
def test_an_adapter_or_all_weights_are_trained(tmp_path, rank):
    changes = {
        "lora.rank": rank,
        "mesh.data": 1,
        **({"batch.layout": "separate", "batch.branch_buckets": (), "batch.action_buckets": ()} if rank else {}),
        "batch.rows_per_device": 5,
    }
    session = Session.open(desk_config(tmp_path, **changes))
    whole, shapes = session.weights(session.trained), session.algorithm.batch_shapes(session.mesh)
    assert shapes.batch_size == 5 and shapes.trunk == (rank == 0)
    if rank == 0:
        assert session.frozen is None and session.policy.lora is None and whole is session.trained
    else:
        assert set(session.trained) == {"layers"} and "lora" not in session.frozen
        assert whole["lora"] is session.trained and whole["embed"] is session.frozen["embed"]
        assert session.policy.lora.rank == 4 == session.trained["layers"]["attention"]["query"]["a"].shape[-1]


def test_prompts_that_never_fit_end_the_run_with_their_lengths(tmp_path):
    sizes = {"rollout.context": 20, "rollout.max_action_tokens": 8, "rollout.prefill_buckets": (16,)}
    session = Session.open(desk_config(tmp_path, **sizes))
    tasks = session.tasks("eval", 3)
    start = [session.env_class().reset(task) for task in tasks]
    lengths = [len(session.chat.prompt(each.messages, each.tools).ids) for each in start]
    assert min(lengths) < max(lengths)
    with pytest.raises(UserError) as caught:
        session.play(session.weights(session.trained), tasks, 2, step=0)
    assert str(caught.value).startswith(
        f"all 6 prompts are longer than rollout.context = 20: {min(lengths)} to {max(lengths)} tokens in 3 tasks."
    )
    with pytest.raises(UserError, match=f": {lengths[0]} tokens in 1 task[.] Set rollout.context to about 128,"):
        session.play(session.weights(session.trained), tasks[:1], 2, step=0)


class Broken:
    """Fails in `reset` of every task whose id is in `broken`."""

    isolation, broken = "thread", ("t0", "t1")

    @classmethod
    def tasks(cls, split, data_dir, **options):
        return [{"id": f"t{n}"} for n in range(3)]

    def reset(self, task):
        if task["id"] in self.broken:
            raise ConnectionError("no server at port 80")
        return Start(({"role": "user", "content": "hello"},))

    def step(self, action):
        return StepResult((), terminated=True)

    def report(self):
        return Report("done")

    def close(self): ...


def test_an_environment_that_never_plays_ends_the_run_and_one_that_did_does_not(tmp_path):
    """Invariant 8: no success 0 of what could not be played."""
    session = Session.open(desk_config(tmp_path, **{"env.name": f"{__name__}:Broken", "env.options": {}}))
    seen, tasks = [], session.tasks("test")
    session.watch = SimpleNamespace(began=lambda *_: None, tick=lambda: None, failed=lambda each: seen.extend(each))
    weights = session.weights(session.trained)
    with pytest.raises(UserError) as caught:
        session.play(weights, tasks[:2], 2, step=0)
    assert str(caught.value).startswith(
        f"none of 4 episodes could be played: environment '{__name__}:Broken' failed in 4 of them, first in reset of"
        " task t0: env_error: ConnectionError: no server at port 80"
    )
    assert len(seen) == 4 and all("in reset" in failure.traceback for failure in seen)
    assert len(session.play(weights, tasks, 2, step=0).episodes) == 2
    later = session.play(weights, tasks[:2], 2, step=1)
    assert not later.episodes and later.failed == 4


def test_held_out_tasks_that_are_trained_on_are_said(tmp_path):
    """Alike in all that they hold; the same id of another task is no matter."""
    session = Session.open(
        desk_config(tmp_path, **{"env.name": f"{__name__}:Broken", "env.options": {}, "eval.tasks": 2})
    )
    train = [{"id": "t0"}, {"id": "t1", "other": 1}, {"id": "t9"}]
    assert session.overlaps(train) == [
        f"1 of {count} tasks of {split} are trained on too: that is no held-out result"
        for split, count in (("eval", 2), ("test", 3))
    ]
    assert session.overlaps(train[1:]) == []
