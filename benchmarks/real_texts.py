"""Text and real checkpoints: a directory of `real_policy` in, differences from an independent tokenizer and from the
stock chat template out. No weights are read.
"""

# gguf is in requirements-parity.txt alone:
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import random
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from benchmarks.injected_faults import play_scripts
from benchmarks.pages import REPO
from benchmarks.plain_bpe import LETTERS, PlainBpe
from benchmarks.real_policy import gguf_file
from hintsd_jax.checkpoints.tokenizer import generation_stops, load_tokenizer
from hintsd_jax.envs.bfcl import Bfcl, script
from hintsd_jax.envs.bfcl.tasks import bfcl_tasks
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.errors import UserError
from hintsd_jax.rollout import tool_messages
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode

CATEGORIES = {"multi_turn_base": 4, "multi_turn_miss_param": 3, "multi_turn_miss_func": 3}  # dialogues of each
# First and last letter of a script's block, all of them in Unicode for long.
SCRIPTS = {
    "latin": (0x61, 0x17F), "greek": (0x391, 0x3C9), "cyrillic": (0x410, 0x44F), "armenian": (0x561, 0x586),
    "hebrew": (0x5D0, 0x5EA), "arabic": (0x621, 0x64A), "devanagari": (0x905, 0x94D), "bengali": (0x985, 0x9B9),
    "tamil": (0xB85, 0xBCD), "thai": (0xE01, 0xE3A), "tibetan": (0xF40, 0xF6C), "georgian": (0x10D0, 0x10F0),
    "hangul parts": (0x1100, 0x1175), "ethiopic": (0x1200, 0x1248), "khmer": (0x1780, 0x17D3),
    "hiragana": (0x3041, 0x3096), "katakana": (0x30A1, 0x30FA), "han": (0x4E00, 0x9FA5), "hangul": (0xAC00, 0xD7A3),
    "wide forms": (0xFF01, 0xFF5E), "mathematical": (0x1D400, 0x1D433), "gothic": (0x10330, 0x1034A),
    "symbols": (0x2190, 0x23FF), "emoji": (0x1F300, 0x1F64F), "numbers": (0x2150, 0x218B), "combining": (0x300, 0x36F),
}  # fmt: skip
DIGITS = [
    "2024-07-26T09:05:00Z",
    "3.14159",
    "0x1F",
    "1,234,567",
    "٠١٢٣٤",
    "१२३",
    "①②③",
    "½ ⅓",
    "x²y³",
    "Ⅻ",
    "１２３",
    "七八",
]
SPACES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n\n",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x0b",
    "\x0c",
    "    ",
    "\u200b",
]
SHORT = ["I'm", "WE'LL", "don't", "it's'", "''re", "'", "a'b", "can'T", "e\u0301've"]


def varied_texts(control: Sequence[str]) -> list[str]:
    """Some 800 texts: every script, digits, spaces, both normal forms, control tokens in text, code, random mixtures.
    The same ones each time.
    """
    rng = random.Random(0)
    words = {name: ["".join(_letters(rng, *ends)) for _ in range(12)] for name, ends in SCRIPTS.items()}
    texts = ["", " ", "a", *DIGITS, *SPACES, *SHORT, *control]
    for of_script in words.values():
        texts += [" ".join(of_script[:6]), "".join(of_script[6:9]), f"{of_script[9]}7{of_script[10]}, {of_script[11]}!"]
    accented = "àéîõü ñçşğ Ångström naïve Việt Nam ở đâu가각힣 が ば ς"
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        texts += [unicodedata.normalize(form, text) for text in (accented, *accented.split())]
    for token in control:
        texts += [f"before{token}after", f" {token} ", f"{token}{token}", token[:-1], f"e{token}\u0301", f"1{token}\n"]
    for file in ("hintsd_jax/sampling/engine.py", "README.md", "Makefile", "hintsd_jax/tools/report/page.js"):
        if (REPO / file).exists():
            lines = (REPO / file).read_text().splitlines(keepends=True)
            texts += ["".join(lines[n : n + 6]) for n in range(0, min(len(lines), 240), 6)]
    pieces = [
        *DIGITS,
        *SPACES * 3,
        *SHORT,
        *control,
        *(word for some in words.values() for word in some[:3]),
        "_",
        "…",
        "—",
    ]
    texts += ["".join(rng.choices(pieces, k=rng.randint(2, 14))) for _ in range(300)]
    texts += ["".join(chr(rng.randrange(1, 0x250)) for _ in range(rng.randint(1, 40))) for _ in range(100)]
    texts += ["ab" * 200, "=" * 300, "\n" * 50, " " * 130, "字" * 100, "9" * 40]
    return texts


def _letters(rng: random.Random, first: int, last: int) -> Iterator[str]:
    while True:
        letter = chr(rng.randint(first, last))
        if unicodedata.category(letter) != "Cn":
            yield letter
            if rng.random() < 0.2:
                return


def compare_tokenizers(name: str, folder: Path) -> dict[str, Any]:
    """Our directory's tokenizer against the plain one, on all texts: how many, and those that differ."""
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=folder.parent) as scratch:
        fields = {key: field.contents() for key, field in GGUFReader(gguf_file(name, Path(scratch))).fields.items()}
    ours, plain = load_tokenizer(folder), PlainBpe(fields)
    texts = varied_texts(sorted(plain.added))
    lost = [n for n, letter in enumerate(LETTERS) if letter not in plain.ids]
    encode = lambda text: ours.encode(text, add_special_tokens=False)
    truth = [plain.encode(text) for text in texts]
    differing = [text for text, ids in zip(texts, truth) if encode(text) != ids]
    bare = _unrepaired(folder)
    normal = (lambda text: unicodedata.normalize("NFC", text)) if plain.family == "qwen2" else lambda text: text
    back = lambda text: ours.decode(encode(text), clean_up_tokenization_spaces=False)
    kept = [text for text in texts if not set(text.encode()) & set(lost)]
    # between two control tokens a text is normalised by itself
    not_back = [text for text in kept if back(text) != "".join(map(normal, plain.control.split(text)))]
    return {
        "texts": len(texts),
        "tokens": sum(len(encode(text)) for text in texts),
        "differ": len(differing),
        "would differ": sum(bare.encode(text, add_special_tokens=False).ids != ids for text, ids in zip(texts, truth)),
        "first": ascii(differing[0]) if differing else "",
        "not decoded back": len(not_back),
        "bytes without a token": lost,
    }


def _unrepaired(folder: Path) -> Tokenizer:
    """The tokenizer as a GGUF alone would give it: to see that the texts tell the difference."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if tokenizer.normalizer is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.normalizer = None
    return tokenizer


def compare_chat(folder: Path) -> dict[str, Any]:
    """How ChatFormat opens the stock template, and whether episodes of BFCL read as it writes them, token for token."""
    tokenizer, opened = load_tokenizer(folder), {}
    for history in (None, "keep", "template"):
        try:
            chat = ChatFormat(tokenizer, history=history, stop_ids=generation_stops(folder))
            opened[str(history)] = chat.deviation or "as the template"
        except UserError as error:
            opened[str(history)] = f"refused: {error}"
    history = next(name for name in (None, "keep", "template") if not opened[str(name)].startswith("refused"))
    chat = ChatFormat(tokenizer, history=history, stop_ids=generation_stops(folder))
    same = tokens = 0
    first = ""
    for episode in bfcl_episodes(chat):
        truth = rendering(tokenizer, chat, episode)
        same += episode.tokens == truth
        tokens += len(truth)
        if episode.tokens != truth and not first:
            at = next((n for n, (a, b) in enumerate(zip(episode.tokens, truth)) if a != b), len(truth))
            piece = slice(max(0, at - 8), at + 16)
            first = f"{tokenizer.decode(episode.tokens[piece])!r} for {tokenizer.decode(truth[piece])!r}"
    result = {
        "adaptation": chat.adaptation,
        "style": chat.style,
        "stops": chat.stop_ids,
        "dialogues": sum(CATEGORIES.values()),
    }
    return {"opened": opened, **result, "same": same, "tokens": tokens, "first difference": first}


def bfcl_episodes(chat: ChatFormat) -> Iterator[Episode]:
    """The ground truth of some tasks, played through the environment."""
    for category, count in CATEGORIES.items():
        tasks = list(bfcl_tasks("train", str(REPO / "data"), categories=[category]))[:count]
        actions = {task["id"]: [script.ground_truth(task, style=chat.style).actions] for task in tasks}
        for _, (episode,) in play_scripts(chat, Bfcl, tasks, actions):
            yield episode


def rendering(tokenizer: Any, chat: ChatFormat, episode: Episode) -> list[int]:
    """What transformers' apply_chat_template makes of the dialogue up to the last action, cut after the stop token of
    that action. Calls are given as data (`tool_calls`) where the template knows them; the tools too, or, where it has
    no place for them, in the system message as `chat.adaptation` declares.
    """
    messages = episode.dialogue(len(episode.steps))
    messages.append({"role": "assistant", "content": episode.steps[-1].text})
    tools = list(episode.tools)
    if "tool_calls" in tokenizer.chat_template:
        messages = [_as_data(message, chat.style, episode.callable_at(len(episode.steps))) for message in messages]
    if "tools" not in tokenizer.chat_template:
        documentation = tool_messages.documentation(tools, chat.style)
        messages, tools = tool_messages.with_documentation(messages, documentation), []
    text = tokenizer.apply_chat_template(list(messages), tools=tools or None, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


def _as_data(message: Mapping[str, Any], style: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    text = message["content"]
    action = parse_action(text, style, tools=tools) if message["role"] == "assistant" else None
    if action is None or not action.calls:
        return dict(message)
    calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in action.calls]
    return {"role": "assistant", "content": "", "tool_calls": json.loads(json.dumps(calls))}


def first_prompts(folder: Path) -> list[tuple[int, ...]]:
    """The prompts, as ids, of the tasks whose dialogues are compared."""
    chat = ChatFormat(load_tokenizer(folder), history="keep", stop_ids=generation_stops(folder))
    return [tuple(episode.streams[0].tokens[: episode.prompt_length]) for episode in bfcl_episodes(chat)]
