"""Chat templates that decide as those of model families do, in our own words, and processors that have them."""

from tokenizers import AddedToken

from ds_moe.models.processor import tiny_processor

# Qwen3: thoughts are shown behind the last question only, the last answer always has one; tools as JSON between tags.
_QWEN = """\
{%- macro flat(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}{%- for part in content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- if tools -%}<|im_start|>system
{%- if messages[0].role == 'system' -%}{{- '\\n' + messages[0].content + '\\n' -}}{%- endif -%}
{{- '\\n<tools>' -}}{%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
{{- '\\n</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- set seen = namespace(last=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' and not flat(m.content).startswith('<tool_response>') -%}
{%- set seen.last = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set body = flat(m.content) -%}
{%- if m.role == 'assistant' -%}
{%- set thought = '' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in body -%}
{%- set thought = body.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set body = body.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > seen.last and (loop.last or thought) -%}
{{- '<think>\\n' + thought.strip('\\n') -}}
{{- '\\n</think>\\n\\n' + body.lstrip('\\n') -}}
{%- else -%}{{- body -}}{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{%- if not loop.first or body -%}{{- '\\n' -}}{%- endif -%}
{%- set call = call.function or call -%}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' -}}
{%- if call.arguments is string -%}{{- call.arguments -}}{%- else -%}{{- call.arguments | tojson -}}{%- endif -%}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|im_start|>user{%- endif -%}
{{- '\\n<tool_response>\\n' + body + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif not (tools and m.role == 'system') -%}{{- '<|im_start|>' + m.role + '\\n' + body + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
"""
HYBRID = _QWEN + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
THINKING = _QWEN + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"

# Llama 3: headers between control tokens, trimmed texts, one call in place of a text, results under another role.
LLAMA = """\
{{- '<|begin|>' -}}
{%- for m in messages -%}
{{- '<|header|>' + ('ipython' if m.role == 'tool' else m.role) + '<|/header|>\\n\\n' -}}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length > 1 -%}{{- raise_exception('one call a turn') -}}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{- '{"name": "' + call.name + '", "parameters": ' -}}{{- call.arguments | tojson -}}{{- '}<|eom|>' -}}
{%- else -%}{{- m.content | trim + '<|eot|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|header|>assistant<|/header|>\\n\\n' -}}{%- endif -%}
"""

# Mistral: nothing announces an answer, the system's text stands in the last question, several tokens around a call.
MISTRAL = """\
{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content + '\\n\\n' -%}
{%- set rest = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- set seen = namespace(last=-1) -%}
{%- for m in rest -%}{%- if m.role == 'user' -%}{%- set seen.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- '<s>' -}}
{%- for m in rest -%}
{%- if m.role == 'user' -%}
{{- '[INST] ' + (system if loop.index0 == seen.last else '') + m.content + '[/INST]' -}}
{%- elif m.role == 'tool' -%}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' -}}
{%- elif m.tool_calls -%}
{{- '[TOOL_CALLS]' -}}
{%- for call in m.tool_calls -%}
{{- call.function.name + '[ARGS]' + (call.function.arguments | tojson) -}}
{%- endfor -%}
{{- '</s>' -}}
{%- else -%}{{- ' ' + m.content + '</s>' -}}{%- endif -%}
{%- endfor -%}
"""
# gpt-oss: a call has control tokens within and an end token of its own, and the last answer ends as no other does.
CHANNELS = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' and m.tool_calls -%}
{%- set call = m.tool_calls[0].function -%}
{{- '<|start|>assistant to=' + call.name + '<|channel|>json<|message|>' + (call.arguments | tojson) + '<|call|>' -}}
{%- elif m.role == 'assistant' -%}
{%- if m.reasoning_content is string and loop.last -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') -}}
{%- else -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""
CONTROL = {
    CHANNELS: ("<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|end|>", "<|return|>"),
    LLAMA: ("<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "<|eom|>"),
    MISTRAL: ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
}
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def with_template(template, kind="text", special=()):
    """The tiny processor with this template and its tokens; `special` names more special tokens."""
    processor = tiny_processor(kind)
    processor.tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    named = [AddedToken(token, special=True, normalized=False) for token in (*CONTROL.get(template, ()), *special)]
    processor.tokenizer.add_tokens(named, special_tokens=True)
    processor.tokenizer.chat_template = template
    if kind == "vl":
        processor.chat_template = template
    return processor


def user(content):
    return {"role": "user", "content": content}


def answer(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def tool(content, **keys):
    return {"role": "tool", "content": content, **keys}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
