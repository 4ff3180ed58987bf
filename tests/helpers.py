"""Shared by tests: a small Qwen-like tokenizer and chat templates, made in memory, offline."""

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# the pre-tokeniser pattern of Qwen2 and Qwen3
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_HEAD = r"""
{%- macro turn(role, body) -%}<|im_start|>{{ role }}
{{ body }}<|im_end|>
{% endmacro -%}
{%- set lead = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools -%}
{%- set ns = namespace(listing='') -%}
{%- for tool in tools -%}{%- set ns.listing = ns.listing + '\n' + (tool | tojson) -%}{%- endfor -%}
{%- set ns.listing = 'These tools may be called:\n<tools>' ~ ns.listing ~ '\n</tools>' -%}
{%- set ns.listing = ns.listing ~ '\nOne call per block:\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>' -%}
{{- turn('system', lead ~ ('\n\n' if lead else '') ~ ns.listing) -}}
{%- elif lead -%}
{{- turn('system', lead) -}}
{%- endif -%}
{%- for m in messages -%}
"""
_TAIL = r"""
{%- if m.role == 'assistant' -%}
{{- turn('assistant', ASSISTANT) -}}
{%- elif m.role == 'tool' -%}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- elif not (m.role == 'system' and loop.first) -%}
{{- turn(m.role, m.content) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

KEEPING_TEMPLATE = _HEAD + _TAIL.replace("ASSISTANT", "m.content")
"""ChatML with Hermes tools, the form of Qwen3-Instruct-2507: every assistant turn stays as it was."""

MINIMAL_TEMPLATE = r"""
{%- for t in tools or [] -%}{{- '<|im_start|>system\n<tools>\n' ~ (t | tojson) ~ '\n</tools><|im_end|>\n' -}}{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""ChatML with nothing else: tool results are turns of their own."""

FORGETTING_TEMPLATE = _HEAD + _TAIL.replace("ASSISTANT", "m.content.split('</think>')[-1].lstrip('\\n')")
"""Drops the thinking of every assistant turn that is history, as reasoning templates do."""

_CORPUS = (
    "The quick brown fox reads the report and sends it to the team. Move the file, then write a mail about it.",
    "Please book a meeting with Ana at 10:30 on 2024-05-17; the notes are in /home/ana/notes.txt.",
    json.dumps({"name": "send_mail", "arguments": {"to": "ana@example.org", "subject": "report", "body": "done"}}),
    json.dumps({"failures": [{"step": 2, "feedback": "use the moved file"}]}),
    "system user assistant tool tools arguments name error ok true false null\n\n",
)


def make_tokenizer(template: str | None = KEEPING_TEMPLATE, *, corpus=_CORPUS, vocab_size=400, extra=()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in Qwen's form, trained on `corpus`; the same every time.

    `extra`: strings added as whole, non-special tokens. Ids: the BPE entries, then the three control tokens
    <|endoftext|> <|im_start|> <|im_end|>, then Qwen's tags (not special), then `extra`.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_train(tuple(corpus), vocab_size, tuple(extra))),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@functools.lru_cache(maxsize=8)
def _train(corpus: tuple[str, ...], vocab_size: int, extra: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tags = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (*tags, *extra)])
    return tokenizer.to_str()
