# SPDX-License-Identifier: Apache-2.0

"""The embedded policy's tokenizer: rendered texts of Desk in, a byte-level BPE of 1,152 entries with Qwen's
pre-tokeniser and a Qwen-style chat template out.

Scaffold strings (frames, call prefixes, tool docs, labels, step numbers, fixed words of the prompts) are added tokens,
so that a request of Desk takes about 60 tokens. Any other text falls back to the BPE: the tokenizer reads everything,
only less densely.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.envs.desk.office import EFFECTS, PARAMETERS, PROBLEMS, tool_docs
from hintsd_jax.envs.desk.reviews import ASKED, GIVEN, REVIEW_WORDS

VOCAB_SIZE = 1152
PAD, OPEN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Step numbers that have a token of their own.
MAX_STEPS = 64

_PRE_TOKENISER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TOOLS_HEAD = (
    '\n\n# Tools\n\nCall tools like this:\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>\n\n<tools>'
)
_TOOLS_FOOT = "\n</tools>"

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- if loop.first and tools %}
{{- HEAD }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- FOOT }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""".replace("HEAD", repr(_TOOLS_HEAD)).replace("FOOT", repr(_TOOLS_FOOT))


def build_tokenizer(corpus: Iterable[str], fixed_strings: Sequence[str]) -> PreTrainedTokenizerFast:
    """Trains the BPE on `corpus` and adds the scaffold.

    Args:
      corpus: rendered texts of Desk; every name must be frequent enough to become one token (checked).
      fixed_strings: further constant texts (the system prompt, the fixed parts of the analyser's prompts), a token
        each.

    Raises:
      ValueError: a name did not become one token.
    """
    scaffold = list(dict.fromkeys([*_scaffold(), *fixed_strings]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENISER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(scaffold) - 3,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without(corpus, scaffold), trainer)
    tokenizer.add_special_tokens([PAD, OPEN, CLOSE])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in scaffold])
    for name in NAMES:
        if {len(tokenizer.encode(f'{quote}{name}"').ids) for quote in ('"', ' "')} != {3}:
            raise ValueError(f"the name {name!r} is not one token: give the BPE more text or more entries")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=CLOSE, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _scaffold() -> list[str]:
    strings = ["system\n", "user\n", "assistant\n"]
    strings += ["user\n<tool_response>\n", "\n</tool_response>", "\n<tool_response>\n"]
    strings += [_TOOLS_HEAD, _TOOLS_FOOT, *("\n" + json.dumps(doc) for doc in tool_docs())]
    strings += ['<tool_call>\n{"name": "', '"}}\n</tool_call>', "</tool_call>"]
    for tool, (first, *others) in PARAMETERS.items():
        strings += [f'{tool}", "arguments": {{"{first}": "', *(f'", "{other}": "' for other in others)]
    strings += [f"#{k}" for k in range(1, MAX_STEPS + 1)]
    strings += ['{"failures": [', *(f'{{"step": {k}, "feedback": "' for k in range(1, MAX_STEPS + 1)), '"}, ', '"}]}']
    labels = [label for decision in DECISIONS.values() for label in decision.labels]
    # A label with the quote behind it: the name that belongs to it is then the very next token.
    strings += [*(f' {label} "' for label in labels), *(f' {label} \\"' for label in labels)]
    strings += [f" {word}" for word in (*labels, *REVIEW_WORDS, "ok", "bad")]
    strings += [ASKED, GIVEN]
    strings += ['{"verdict": ', "-1", '{"hint": "', '"}', *(f"Call {tool}" for tool in EFFECTS)]
    strings += [f"Error: {problem}." for problem in PROBLEMS.values()]
    return [*strings, "\n> user: ", "\n> ", "user: ", "terminated", "Ok.", "Done.", "Found", ' <tool_call>\n{"name": "']


def _without(corpus: Iterable[str], scaffold: Sequence[str]) -> Iterable[str]:
    """The BPE should spend its entries on what the added tokens leave over."""
    longest_first = sorted(scaffold, key=len, reverse=True)
    for text in corpus:
        for string in longest_first:
            text = text.replace(string, "\n")
        yield text
    rng = random.Random(0)
    for _ in range(40):
        yield "".join(f' "{name}"' for name in rng.sample(NAMES, len(NAMES)))  # never a quote alone before a name
