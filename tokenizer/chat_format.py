r"""Chat format: messages to ids and loss mask in one pass, for training, chat and serving.

The format is ChatML. An assistant's content and end of turn (underlined) are supervised:

    <|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n您好<|im_end|>\n
                                                             ----__________

A message is a dict with "role" (system, user, assistant, tool) and "content" (text). Optional keys:

    tools               system message: a list of JSON objects, appended one per line
    reasoning_content   assistant: reasoning, between <think> and </think> before the content
    tool_calls          assistant: [{"name", "arguments"}], each between <tool_call> tags
    weight              assistant: 0 = the turn is not supervised

Reasoning and calls are supervised. A tool's answer is a user turn between <tool_response> tags and
is not supervised. No default system message or empty reasoning is added. The content is encoded
separately from "assistant\n"; the pre-tokenizer (tools/train_tokenizer.py) ensures that encoding
both together gives the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from typing import Any

from tokenizer.bpe import Sequence, Tokenizer

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")


class Tag(str):
    """The text of a special token, to be encoded as its id."""


def render_conversation(tokenizer: Tokenizer, messages: SequenceABC[Message]) -> Sequence:
    """Return the ids of a conversation; assistant turns and their end tokens are supervised."""
    ids: list[int] = []
    mask: list[bool] = []

    def add(piece: list[int], value: bool) -> None:
        ids.extend(piece)
        mask.extend([value] * len(piece))

    for message in messages:
        supervised = message["role"] == "assistant" and message.get("weight") != 0
        add(_open_turn(tokenizer, "user" if message["role"] == "tool" else message["role"]), False)
        for piece in _pieces(message):
            add(tokenizer.encode_tag(piece) if isinstance(piece, Tag) else tokenizer.encode(piece),
                supervised)  # fmt: skip
        add([tokenizer.im_end_id], supervised)
        add(tokenizer.encode("\n"), False)
    return Sequence(ids, mask)


def render_prompt(tokenizer: Tokenizer, messages: SequenceABC[Message]) -> list[int]:
    """Return the ids of a conversation, followed by the start of an assistant turn."""
    return render_conversation(tokenizer, messages).ids + _open_turn(tokenizer, "assistant")


def _open_turn(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.im_start_id, *tokenizer.encode(role + "\n")]


def _pieces(message: Message) -> Iterator[str]:
    """Yield the content of a turn: tags, and the texts between them."""
    content, role = message["content"], message["role"]
    if role == "tool":
        yield from (Tag("<tool_response>"), f"\n{content}\n", Tag("</tool_response>"))
        return
    if role == "system" and message.get("tools"):
        lines = "".join("\n" + _json(tool) for tool in message["tools"])
        yield content + ("\n\n" if content else "") + f"# Tools\n<tools>{lines}\n</tools>"
        return
    separator = ""
    if role == "assistant" and (thoughts := message.get("reasoning_content")):
        yield from (Tag("<think>"), f"\n{thoughts}\n", Tag("</think>"))
        separator = "\n\n"
    text = separator + content
    for number, call in enumerate(message.get("tool_calls") or () if role == "assistant" else ()):
        yield text + ("\n" if content or number else "")
        arguments = call["arguments"]
        arguments = arguments if isinstance(arguments, str) else _json(arguments)
        yield Tag("<tool_call>")
        yield f'\n{{"name": {_json(call["name"])}, "arguments": {arguments}}}\n'
        yield Tag("</tool_call>")
        text = ""
    yield text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
