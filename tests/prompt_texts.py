"""The exact texts that analyser, judges and teachers read for one failed BFCL episode, as fixtures keep them.

Write the fixtures again after a wanted change: `python -m tests.prompt_texts`, and read the difference.
"""

from pathlib import Path

from hintsd_jax.algorithms.branching import with_feedback
from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.bfcl.env import Bfcl
from hintsd_jax.envs.tool_calls import parse_action, render_call
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from tests.bfcl_helpers import task_of
from tests.helpers import make_tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "prompts"
ORDER = {"order_type": "Buy", "symbol": "ZETA", "price": 100.0, "amount": 50}  # at 150 it would have been right
ACTIONS = (
    ToolCall("add_to_watchlist", {"stock": "ZETA"}),
    "ZETA is on your watchlist.",
    ToolCall("get_watchlist", {}),
    "You keep tabs on NVDA and ZETA.",
    ToolCall("get_stock_info", {"symbol": "ZETA"}),
    "Zeta Corp stands at 150.",
    ToolCall("place_order", ORDER),
    "The order is placed.",
    ToolCall("fund_account", {"amount": 5000}),
    "Done.",
)
TARGET = Target(7, "Place the order at the current market price of 150.0, which the look-up has just shown.")


def failed_episode(chat: ChatFormat) -> Episode:
    """multi_turn_base_142, with an order at a wrong price."""
    env, task = Bfcl(format="official"), task_of("base", 142)
    start = env.reset(task)
    prompt = chat.prompt(start.messages, start.tools)
    episode = Episode.begin(task["id"], 0, start.messages, prompt, start.tools)
    for action in ACTIONS:
        text = action if isinstance(action, str) else render_call(action)
        ids = chat.encode(text)
        episode.append_action(ids, [-1.0] * len(ids), text)
        result = env.step(parse_action(text))
        delta = None if result.terminated else chat.delta(result.messages)
        episode.append_observation(delta, result.messages, result.reward)
        episode.reward, episode.terminated = result.reward, result.terminated
    episode.ended, episode.report = "terminated", env.report()
    assert episode.terminated and not episode.success and len(episode.steps) == len(ACTIONS)
    return episode


def texts() -> dict[str, str]:
    """Every text by the fixture's name."""
    tokenizer = make_tokenizer()
    chat = ChatFormat(tokenizer)
    episode, benchmark = failed_episode(chat), prompts.Benchmark.of(Bfcl, "bfcl")
    made = {}
    for name in ("released", "compact"):
        words = prompts.find(name)
        asked = {
            "review": words.review(episode, benchmark, 3, 12_000),
            "review_single": words.review(episode, benchmark, 1, 12_000),
            "step_feedback": words.step_feedback(episode, benchmark, TARGET.step, 12_000),
            **{f"judge_{name}": messages for name, messages in words.judge(episode.steps[TARGET.step - 1]).items()},
        }
        for question, messages in asked.items():
            made[f"{name}_{question.replace(' ', '_')}"] = _shown(messages)
        for position in ("target", "last_user", "start"):
            (branch,) = with_feedback(episode, [TARGET], position, words, chat, {})
            shared = f"[{branch.prefix_length} tokens as the student read them]\n"
            # from where the teacher's context departs; a little of what is shared, to see where that is
            context = tokenizer.decode(episode.tokens[branch.prefix_length - 8 : branch.prefix_length])
            read = tokenizer.decode(branch.context)
            made[f"{name}_teacher_{position}"] = f"{shared}...{context}{read}"
        solved = [step.text for step in episode.steps[:2]]
        made[f"{name}_teacher_reprompt"] = _shown(words.teacher_reprompt(episode.prompt_messages, solution=solved))
        made[f"{name}_teacher_reprompt_feedback"] = _shown(
            words.teacher_reprompt(episode.prompt_messages, targets=[TARGET])
        )
    return made


def _shown(messages) -> str:
    return "\n".join(f"=== {message['role']} ===\n{message['content']}" for message in messages) + "\n"


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    for name, text in texts().items():
        (FIXTURES / f"{name}.txt").write_text(text)
