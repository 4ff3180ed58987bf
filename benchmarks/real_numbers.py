"""Numbers of real checkpoints: a directory of `real_policy` in, differences from transformers and seconds beside its
own out. Both have the same float32 weights in one process, and take turns where time is measured.

Needs requirements-parity.txt (torch). Letters: T tokens, D width, V vocabulary.
"""

# torch is in requirements-parity.txt alone:
# pyright: reportMissingImports=false
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.pages import REPO
from benchmarks.real_texts import first_prompts
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.models import decoder
from hintsd_jax.sampling import Engine, EngineConfig, Sampling

GREEDY = 64  # tokens
PREFILL = 1024  # tokens
DECODED = 64
ROUNDS = 3  # of every time; the middle one counts
ROWS = 256  # logits that are compared at once


class Greedy:
    """A job of one greedy generation."""

    key = np.zeros(2, np.uint32)

    def __init__(self, prompt: Sequence[int], tokens: int):
        self.prompt, self.context = prompt, len(prompt) + tokens
        self.sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=tokens)
        self.ids: list[int] = []
        self.logprobs: list[float] = []

    def begin(self, slot: int) -> Sequence[int]:
        return self.prompt

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        self.ids, self.logprobs = ids, logprobs

    def collect(self) -> None:
        return None


def prompts(folder: Path) -> dict[str, list[int]]:
    """Prompts by name, as ids: a question, several scripts, code, the tools of a BFCL task (thousands of tokens)."""
    tokenizer = load_tokenizer(folder)
    asked = {
        "question": "Why is the sky blue? Answer in two sentences.",
        "code": "What does this do?\n\n" + (REPO / "hintsd_jax/sampling/engine.py").read_text()[:2500],
        "scripts": "Translate to English: Grüße aus Köln, 東京は今日も晴れです, Привет из Москвы, مرحبا 2024, नमस्ते.",
    }
    chat = lambda text: tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    return {
        **{name: encode(chat(text)) for name, text in asked.items()},
        "tools": list(min(first_prompts(folder), key=len)),
    }


def load(folder: Path) -> tuple[Any, Any, Any]:
    """(transformers' model, our policy, our params), all in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy, params = load_policy(folder)
    return model, policy, params


@partial(jax.jit, static_argnums=1)
def _hidden(params, policy, tokens_BT):
    return decoder.forward(params, policy, tokens_BT)


@partial(jax.jit, static_argnums=1)
def _project(params, policy, hidden_TD):
    return decoder.project(params, policy, hidden_TD)


@torch.no_grad()
def logit_differences(model: Any, policy: Any, params: Any, ids: Sequence[int]) -> dict[str, float]:
    """Logits at every position of one prompt. largest: absolute difference. relative: norm of the difference over that
    of the logits. scale: the largest logit. same_top: the share of positions with the same most likely token.
    """
    theirs_TD = model.model(torch.tensor([ids])).last_hidden_state[0]
    ours_TD = np.asarray(_hidden(params, policy, np.asarray([ids], np.int32)))[0]
    largest = scale = square = whole = same = 0.0
    for first in range(0, len(ids), ROWS):
        theirs_TV = model.lm_head(theirs_TD[first : first + ROWS]).numpy()
        ours_TV = np.asarray(_project(params, policy, ours_TD[first : first + ROWS]))
        gap = ours_TV - theirs_TV
        largest, scale = max(largest, np.abs(gap).max()), max(scale, np.abs(theirs_TV).max())
        square += np.square(gap, dtype=np.float64).sum()
        whole += np.square(theirs_TV, dtype=np.float64).sum()
        same += (ours_TV.argmax(-1) == theirs_TV.argmax(-1)).sum()
    result = {"largest": largest, "relative": (square / whole) ** 0.5, "scale": scale, "same_top": same / len(ids)}
    return {"tokens": len(ids), **{name: float(value) for name, value in result.items()}}


@torch.no_grad()
def greedy_differences(model: Any, policy: Any, params: Any, asked: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """64 greedy tokens of every prompt, no token stopping them: how many are the same from the first one on, and the
    largest difference of their log-probabilities; tokens after a different one do not count.
    """
    jobs = {name: Greedy(ids, GREEDY) for name, ids in asked.items()}
    context = max(job.context for job in jobs.values())
    shapes = EngineConfig(len(jobs), context, GREEDY, prefill_buckets=(64, 256), prefill_rows=1)
    Engine(policy, shapes, stop_ids=(policy.vocab_size,)).run(params, list(jobs.values()))
    found = {}
    for name, job in jobs.items():
        ids = torch.tensor([asked[name]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=GREEDY, eos_token_id=None,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        theirs = out.sequences[0, len(asked[name]) :].tolist()
        logp = torch.log_softmax(torch.cat(out.logits), -1)[range(GREEDY), theirs].numpy()
        same = next((n for n, (a, b) in enumerate(zip(job.ids, theirs)) if a != b), GREEDY)
        gap = np.abs(np.asarray(job.logprobs)[:same] - logp[:same]).max(initial=0.0)
        found[name] = {"tokens": len(asked[name]), "same": same, "logprobs": float(gap)}
    return found


def speed(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds (load), tokens a second (prefill of 1,024, decode of 64 at batch 1 and 8): ours and theirs, in turns."""
    result: dict[str, dict[str, float]] = {}

    def ours_loaded():
        return jax.block_until_ready(load_policy(folder)[1])

    def theirs_loaded():  # its tensors are views of the file until they are read
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return [parameter.sum() for parameter in model.parameters()]

    result["load"] = _in_turns(ours_loaded, theirs_loaded)
    model, policy, params = load(folder)
    rng = np.random.default_rng(0)
    row = lambda length: rng.integers(100, 40_000, length).tolist()
    context = PREFILL + DECODED + 1

    def runs(batch: int, length: int) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
        rows = [row(length) for _ in range(batch)]
        shapes = EngineConfig(batch, context, DECODED + 1, prefill_buckets=(length,), prefill_rows=batch)
        engine = Engine(policy, shapes, stop_ids=(policy.vocab_size,))
        ids = torch.tensor(rows)

        def ours(tokens: int) -> None:
            engine.run(params, [Greedy(ids, tokens) for ids in rows])

        @torch.no_grad()
        def theirs(tokens: int) -> None:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip

        return ours, theirs

    ours, theirs = runs(1, PREFILL)
    seconds = _in_turns(lambda: ours(1), lambda: theirs(1))
    result["prefill"] = {who: PREFILL / value for who, value in seconds.items()}
    for batch in (1, 8):
        ours, theirs = runs(batch, 16)
        one, many = (_in_turns(partial(ours, n), partial(theirs, n)) for n in (1, DECODED + 1))
        result[f"decode {batch}"] = {who: batch * DECODED / (many[who] - one[who]) for who in one}
    return result


def _in_turns(ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, float]:
    """The middle of some rounds' seconds, each after one that does not count (it compiles)."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(1 + ROUNDS):
        for who, function in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            function()
            seconds[who].append(time.perf_counter() - start)
    return {who: statistics.median(values[1:]) for who, values in seconds.items()}


def numbers(folder: Path) -> dict[str, Any]:
    """Differences of logits by prompt, and of greedy generations by prompt."""
    asked = prompts(folder)
    model, policy, params = load(folder)
    logits = {name: logit_differences(model, policy, params, ids) for name, ids in asked.items()}
    return {"logits": logits, "greedy": greedy_differences(model, policy, params, asked)}
