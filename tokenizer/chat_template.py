"""The chat format as a Jinja template, for transformers and other programs.

It renders the same text as chat_format.render_conversation. `tools` may be an argument, as passed
by transformers, or part of the first message. If content contains the text of a special token, the
ids differ: transformers parses the token, but render_conversation keeps it as text. As in Qwen3's
template, `enable_thinking` is false for an answer without reasoning.

The tag `generation` marks what is supervised, for transformers' return_assistant_tokens_mask and
TRL's assistant_only_loss. llama.cpp and @huggingface/jinja (0.5.1 or newer) ignore it. Programs
with minijinja remove it as text, so it must be written exactly so, without dashes.
"""

from __future__ import annotations

CHAT_TEMPLATE = (
    "{%- set first = messages[0] if messages else {} -%}"
    "{%- set functions = tools if tools is defined and tools else first.tools -%}"
    "{%- set heading -%}"
    "{%- if functions -%}"
    "{{- '# Tools\\n<tools>' -}}"
    "{%- for function in functions -%}{{- '\\n' + function | tojson -}}{%- endfor -%}"
    "{{- '\\n</tools>' -}}"
    "{%- endif -%}"
    "{%- endset -%}"
    "{%- if functions and first.role != 'system' -%}"
    "{{- '<|im_start|>system\\n' + heading + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set content = message.content or '' -%}"
    "{%- if message.role == 'tool' -%}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>' -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if message.enable_thinking is false and not message.reasoning_content -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}"
    "{%- endif -%}"
    "{% generation %}"
    "{%- if message.reasoning_content -%}"
    "{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}"
    "{%- endif -%}"
    "{{- content -}}"
    "{%- for tool_call in message.tool_calls or [] -%}"
    "{%- set call = tool_call.function or tool_call -%}"
    "{%- if content or not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    "{{- '<tool_call>\\n{\"name\": ' + call.name | tojson + ', \"arguments\": ' -}}"
    "{{- call.arguments if call.arguments is string else call.arguments | tojson -}}"
    "{{- '}\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>' -}}"
    "{% endgeneration %}"
    "{%- else -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + content -}}"
    "{%- if message.role == 'system' and loop.first and functions -%}"
    "{{- ('\\n\\n' if content else '') + heading -}}"
    "{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}"
    "{%- endif -%}"
    "{%- endif -%}"
)
