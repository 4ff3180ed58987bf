"""HINT-SD, OpenClaw-RL and SDPO from text to loss: what the teacher reads is written here by hand as messages, rendered
by the chat template as a whole, and every action is scored on its own, in NumPy's float64.
"""

import functools

import jax
import numpy as np
import pytest

from hintsd_jax.config import build
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import make_mesh
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.batching import make_batches
from hintsd_jax.training.train_step import batch_losses
from tests import loss_oracles
from tests.configs import algorithm_config
from tests.examples_helpers import experience_of
from tests.helpers import KEEPING_TEMPLATE, make_tokenizer

TOKENIZER = make_tokenizer(KEEPING_TEMPLATE)
CHAT = ChatFormat(TOKENIZER)
POLICY = PolicyConfig(
    vocab_size=CHAT.vocab_size, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
    rope_theta=1e4, norm_eps=1e-6, tie_embeddings=True, max_positions=1024, remat=False,
)  # fmt: skip
MESH = make_mesh(devices=jax.devices()[:1])
CONTEXT = 768
LENGTHS = {
    "rollout.context": CONTEXT,
    "rollout.max_action_tokens": 40,
    "hindsight.context": 0,  # derived
    "hindsight.max_tokens": 64,
    "batch.length_buckets": (CONTEXT,),
    "batch.branch_buckets": (2 * CONTEXT,),
    "batch.action_buckets": (128,),
    "batch.whole_episode_buckets": (2 * CONTEXT, 128),
    "batch.rows_per_device": 2,
    "rollout.prefill_buckets": (64,),
    "rollout.top_p": 0.8,
}
SYSTEM, TASK, MORE = (
    {"role": role, "content": text} for role, text in (("system", "Rules."), ("user", "Move it."), ("user", "And now?"))
)
SEEN = {"role": "tool", "content": "a, b"}
RIGHT = ("<think>\nb is new\n</think>\n\ntake b", "done", "bye")
WRONG = ("take a", "done", "bye")


@functools.cache
def weights(seed):
    """Random enough that distributions are not flat."""
    shapes = jax.eval_shape(functools.partial(decoder.init_params, POLICY), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return np.float32(rng.normal(float("norm" in jax.tree_util.keystr(path)), 0.5, leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@jax.jit
def forward(params, tokens_BT):
    return decoder.project(params, POLICY, decoder.forward(params, POLICY, tokens_BT))


def logits_of(params, context, action):
    """Logits that predict an action's tokens."""
    tokens_T = np.zeros((1, CONTEXT), np.int32)
    tokens_T[0, : len(context) + len(action)] = [*context, *action]
    return np.asarray(forward(params, tokens_T))[0, len(context) - 1 : len(context) - 1 + len(action)]


def render(messages):
    text = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return TOKENIZER.encode(text, add_special_tokens=False)


def played(rollout, texts, success):
    """SYSTEM, TASK, an action, what is seen, an action, MORE, an action."""
    rng = np.random.default_rng(rollout)
    episode = Episode.begin("task", rollout, (SYSTEM, TASK), CHAT.prompt((SYSTEM, TASK)))
    for text, messages in zip(texts, ((SEEN,), (MORE,), ()), strict=True):
        ids = CHAT.encode(text)
        episode.append_action(ids, rng.normal(-6, 2, len(ids)), text)
        episode.append_observation(CHAT.delta(messages) if messages else None, messages)
    episode.reward, episode.terminated, episode.ended = float(success), True, "terminated"
    return episode


def dialogue(texts, upto):
    """The messages before step `upto`, with the first ones and MORE as they were."""
    said = [{"role": "assistant", "content": text} for text in texts]
    return [SYSTEM, TASK, said[0], SEEN, said[1], MORE][: (2, 4, 6)[upto - 1]]


def user(text):
    return {"role": "user", "content": text}


def sdpo(texts, step):
    """One user message: the task, the sibling's actions without their reasoning, the request."""
    text = "Move it.\n\nA correct solution of an earlier attempt:\n\ntake b\ndone\nbye\n\nNow solve the original task"
    return [SYSTEM, user(f"{text} correctly."), *dialogue(texts, step)[2:]]


def hint_sd(texts, step):
    said = "Take the following feedback into account for this step.\n\nTake the new one."
    return [*dialogue(texts, step), user(said)]


def openclaw(texts, step):
    """The hint under its heading in the last message of a user."""
    messages = dialogue(texts, step)
    place = 5 if step == 3 else 1
    return [
        *messages[:place],
        user(f"{messages[place]['content']}\n\n## Hint\nTake the new one."),
        *messages[place + 1 :],
    ]


HINTS = [(step, "Take the new one.") for step in (1, 3)]
CASES = {  # of the failed episode: hindsight, then (step, what its teacher reads, the verdict)
    "sdpo": (([], ()), [(step, sdpo, 0.0) for step in (1, 2, 3)]),
    "hint_sd": ((HINTS, ()), [(step, hint_sd, 0.0) for step in (1, 3)]),
    "openclaw_rl": ((HINTS, (-1.0, 1.0, 0.0)), [(1, openclaw, -1.0), (2, None, 1.0), (3, openclaw, 0.0)]),
}


@pytest.mark.parametrize("name", CASES)
def test_from_text_to_loss(name):
    config = algorithm_config(name, LENGTHS)
    algorithm = build.algorithm(config)
    episodes = [played(0, RIGHT, True), played(1, WRONG, False)]
    (targets, verdicts), trained = CASES[name]
    experience = experience_of(episodes, [(1, targets, verdicts)] if targets else [], CHAT)
    examples, _ = algorithm.examples(experience)
    assert {example.episode for example in examples} == {1}
    batches = make_batches(examples, algorithm.batch_shapes(MESH), algorithm.loss).batches
    with jax.set_mesh(MESH):
        sums = [batch_losses(weights(1), weights(2), batch, POLICY, algorithm.loss)[0] for batch in batches]
    (part,), expected, tokens = algorithm.loss.parts, 0.0, 0
    for step, reads, verdict in trained:
        action, context = CHAT.encode(WRONG[step - 1]), render(dialogue(WRONG, step))
        student = logits_of(weights(1), context, action)
        teacher = logits_of(weights(2), render(reads(WRONG, step)), action) if reads else student
        sampled = episodes[1].logprobs[sum(len(CHAT.encode(text)) for text in WRONG[: step - 1]) :]
        for s, t, token, sampler in zip(student, teacher, action, sampled, strict=False):
            scored, distribution = reads is not None, algorithm.loss.sampling
            loss, _ = loss_oracles.token_loss(part, s, t, token, sampler, verdict, scored, distribution)
            expected, tokens = expected + loss, tokens + 1
    assert tokens == sum(float(each["tokens"]) for each in sums) > 0 and abs(expected) > 0.1
    np.testing.assert_allclose(sum(float(each["loss"]) for each in sums), expected, rtol=2e-5)
