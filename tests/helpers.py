"""Shared by tests: small tokenizers and chat templates in the form of Qwen and Llama, made in memory, offline."""

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# the pre-tokeniser pattern of Qwen2 and Qwen3
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's: up to three digits at a time
LLAMA_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

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

# -- The families, in what their published templates do with a dialogue; the wording is ours.

_THINKING = r"""
{%- macro calls(m) -%}
{%- for call in m.tool_calls or [] -%}
{{- ('\n' if m.content or not loop.first else '') ~ '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
{{- (call.function.arguments | tojson) ~ '}\n</tool_call>' -}}
{%- endfor -%}
{%- endmacro -%}
{%- macro spoken(m, recent, last) -%}
{%- set said = m.content.split('</think>')[-1].lstrip('\n') if '</think>' in m.content else m.content -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' -%}
{{- ('<think>\n' ~ thought ~ '\n</think>\n\n' ~ said.lstrip('\n') if recent and (last or thought) else said) ~ calls(m) -}}
{%- endmacro -%}
{%- set query = namespace(last=messages | length - 1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}
{%- set query.last = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
"""
_OPENED = "'<|im_start|>assistant\\n' -"

QWEN3_TEMPLATE = (
    _THINKING + _HEAD + _TAIL.replace("ASSISTANT", "spoken(m, loop.index0 > query.last, loop.last)")
).replace(
    _OPENED,
    "'<|im_start|>assistant\\n' ~ ('<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '') -",
)
"""Stock Qwen3: the thinking of turns before the last thing that the user said is dropped; enable_thinking=False opens
and closes it.
"""

QWEN3_THINKING_TEMPLATE = QWEN3_TEMPLATE.replace(
    "'<|im_start|>assistant\\n' ~", "'<|im_start|>assistant\\n<think>\\n' ~"
)
"""Qwen3-Thinking-2507: the same, and the generation prompt opens the thinking."""

QWEN25_TEMPLATE = (
    _THINKING.partition("{%- macro spoken")[0]
    + _HEAD.replace("messages[0].role == 'system' else ''", "messages[0].role == 'system' else 'You are of use.'")
    + _TAIL.replace("ASSISTANT", "m.content ~ calls(m)")
)
"""Qwen2.5: a system prompt of its own where the dialogue has none; every turn stays."""

LLAMA3_TEMPLATE = r"""
{%- if date_string is not defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}
{%- macro turn(role, body) -%}
{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' ~ body ~ '<|eot_id|>' -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' -%}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{{- turn('system', ('Tools: yes\n' if tools else '') ~ 'Day: ' ~ date_string ~ '\n\n' ~ system) -}}
{%- if tools -%}
{%- if not rest -%}{{- raise_exception('tools need a first user message to stand in') -}}{%- endif -%}
{%- set ns = namespace(listing='Call these with {"name": ..., "parameters": {...}}.\n\n') -%}
{%- for tool in tools -%}{%- set ns.listing = ns.listing ~ (tool | tojson(indent=4)) ~ '\n\n' -%}{%- endfor -%}
{{- turn('user', ns.listing ~ rest[0].content | trim) -}}
{%- set rest = rest[1:] -%}
{%- endif -%}
{%- for m in rest -%}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length != 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{- turn('assistant', '{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}') -}}
{%- elif m.role in ('tool', 'ipython') -%}
{{- turn('ipython', m.content | tojson) -}}
{%- else -%}
{{- turn(m.role, m.content | trim) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""
"""Llama 3.1 to 3.3: BOS, a date, tools in the first user message, one bare call a turn, results as JSON strings of role
ipython, contents trimmed."""

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)
"""SmolLM2-Instruct's own text (Apache-2.0): it knows no tools, and has a system message where the dialogue has none."""

AUSTERE_TEMPLATE = r"""
{%- for m in messages -%}
{%- if m.role not in ('user', 'assistant') -%}{{- raise_exception(m.role ~ ' role not supported') -}}{%- endif -%}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""ChatML for user and assistant alone: no system message, no tools, no results."""

_XML_CALLS = r"""
{%- macro calls(m) -%}
{%- for call in m.tool_calls or [] -%}
{{- ('\n' if not loop.first else '\n\n' if m.content | trim else '') ~ '<tool_call>\n<function=' ~ call.function.name ~ '>\n' -}}
{%- for key, value in call.function.arguments | items -%}
{%- set plain = value is string or not (value is mapping or value is sequence) -%}
{{- '<parameter=' ~ key ~ '>\n' ~ (value | string if plain else value | tojson) ~ '\n</parameter>\n' -}}
{%- endfor -%}
{{- '</function>\n</tool_call>' -}}
{%- endfor -%}
{%- endmacro -%}
"""

QWEN3_CODER_TEMPLATE = _XML_CALLS + _HEAD + _TAIL.replace("ASSISTANT", "m.content ~ calls(m)")
"""Qwen3-Coder: calls as XML, every turn stays."""

QWEN35_TEMPLATE = _XML_CALLS + QWEN3_THINKING_TEMPLATE.partition("{%- endmacro -%}")[2]
"""Qwen3.5: the same calls, and the generation prompt opens the thinking."""

LFM25_TEMPLATE = r"""
{%- macro written(value) -%}
{{- "'" ~ value ~ "'" if value is string else value | tojson if value is mapping else value | string -}}
{%- endmacro -%}
{%- macro calls(m) -%}
{%- for call in m.tool_calls or [] -%}
{{- ('<|tool_call_start|>[' if loop.first else ', ') ~ call.function.name ~ '(' -}}
{%- for key, value in call.function.arguments | items -%}
{{- ('' if loop.first else ', ') ~ key ~ '=' ~ written(value) -}}
{%- endfor -%}
{{- ')' ~ (']<|tool_call_end|>' if loop.last else '') -}}
{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set lead = messages[0].content if messages[0].role == 'system' else '' -%}
{%- set lead = lead ~ ('\n\n' if lead and tools else '') ~ ('Tools: ' ~ (tools | tojson) if tools else '') -%}
{%- if lead -%}{{- '<|im_start|>system\n' ~ lead ~ '<|im_end|>\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if not (loop.first and m.role == 'system') -%}
{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ (calls(m) if m.role == 'assistant' else '') ~ '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""LFM2.5: Python calls between tags, strings in single quotes as they are, dictionaries as JSON."""

OLMO3_TEMPLATE = r"""
{%- macro calls(m) -%}
{%- for call in m.tool_calls or [] -%}
{{- ('<function_calls>' if loop.first else '\n') ~ call.function.name ~ '(' -}}
{%- for key, value in call.function.arguments | items -%}
{{- ('' if loop.first else ', ') ~ key ~ '=' ~ (value | tojson) -}}
{%- endfor -%}
{{- ')' ~ ('</function_calls>' if loop.last else '') -}}
{%- endfor -%}
{%- endmacro -%}
{%- set names = {'tool': 'environment'} -%}
{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful AI assistant. <functions>' ~ (tools | tojson if tools else '') -}}
{{- '</functions><|im_end|>\n' -}}
{%- endif -%}
{{- '<|im_start|>' ~ names.get(m.role, m.role) ~ '\n' ~ m.content ~ (calls(m) if m.role == 'assistant' else '') -}}
{{- '<functions>' ~ (tools | tojson) ~ '</functions>' if m.role == 'system' and tools else '' -}}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""OLMo 3: Python calls, one a line, between tags, values as JSON; results from the role `environment`."""

GEMMA3_TEMPLATE = r"""
{{- bos_token -}}
{%- set has_system = messages[0].role == 'system' -%}
{%- set lead = messages[0].content ~ '\n\n' if has_system else '' -%}
{%- for m in (messages[1:] if has_system else messages) -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{- '<start_of_turn>' ~ role ~ '\n' ~ (lead if loop.first else '') ~ (m.content | trim) ~ '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
"""Gemma 3: no tools, no results, no two messages of a role in a row; contents trimmed."""

LFM2_TEMPLATE = LFM25_TEMPLATE.replace("(calls(m) if m.role == 'assistant' else '')", "''")
"""LFM2: the same models' first template, which writes no calls itself."""

LLAMA4_TEMPLATE = LLAMA3_TEMPLATE.replace(
    """'{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}'""", "written(call)"
).replace(
    "{%- macro turn",
    r"""{%- macro written(call) -%}
{{- '[' ~ call.name ~ '(' -}}
{%- for key in call.arguments -%}{{- key ~ '="' ~ call.arguments[key] ~ '"' -}}{{- '' if loop.last else ', ' -}}{%- endfor -%}
{{- ')]' -}}
{%- endmacro -%}
{%- macro turn""",
)
"""Llama 4's Python calls as vLLM's template for them has it: every value in double quotes."""

_CORPUS = (
    "The quick brown fox reads the report and sends it to the team. Move the file, then write a mail about it.",
    "Please book a meeting with Ana at 10:30 on 2024-05-17; the notes are in /home/ana/notes.txt.",
    json.dumps({"name": "send_mail", "arguments": {"to": "ana@example.org", "subject": "report", "body": "done"}}),
    json.dumps({"failures": [{"step": 2, "feedback": "use the moved file"}]}),
    "system user assistant tool tools arguments name error ok true false null\n\n",
)


def make_tokenizer(
    template: str | None = KEEPING_TEMPLATE, *, corpus=_CORPUS, vocab_size=400, extra=()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in Qwen's form, trained on `corpus`; the same every time.

    `extra`: strings added as whole, non-special tokens. Ids: the BPE entries, then the three control tokens
    <|endoftext|> <|im_start|> <|im_end|>, then Qwen's tags (not special), then `extra`.
    """
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tags = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    definition = _train(tuple(corpus), vocab_size, QWEN_SPLIT, control, (*tags, *extra))
    return _wrap(definition, template, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make_llama_tokenizer(template: str | None = LLAMA3_TEMPLATE, *, vocab_size=400) -> PreTrainedTokenizerFast:
    """The same in Llama 3's form: no normalizer, no tags, its control tokens after the BPE entries, a BOS before what
    is encoded with special tokens."""
    control = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    )
    tokenizer = _wrap(
        _train(_CORPUS, vocab_size, LLAMA_SPLIT, control, ()), template, bos_token=control[0], eos_token="<|eot_id|>"
    )
    bos = (control[0], tokenizer.convert_tokens_to_ids(control[0]))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    return tokenizer


def _wrap(definition: str, template: str | None, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(definition), clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = template
    return tokenizer


@functools.lru_cache(maxsize=8)
def _train(
    corpus: tuple[str, ...], vocab_size: int, pattern: str, control: tuple[str, ...], plain: tuple[str, ...]
) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if pattern == QWEN_SPLIT else None
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return tokenizer.to_str()
