"""Messages to ids and loss mask, in one pass: the one renderer of training, chat and serving.

ChatML. Under the loss (underlined) are the assistant's words and the end of the turn:

    <|im_start|>user\\n你好<|im_end|>\\n<|im_start|>assistant\\n您好<|im_end|>\\n
                                                              ----__________

A message is a dict with "role" (system, user, assistant or tool) and "content" (text), and may have

    tools               of a system message: a list of JSON objects, appended one a line
    reasoning_content   of an assistant's: thoughts, between <think> and </think> before the content
    tool_calls          of an assistant's: [{"name", "arguments"}], each between <tool_call> tags

Thoughts and calls are what the model must write, so they are under the loss. What a tool answers
is a turn of the user's, between <tool_response> tags, never under the loss. No system message and
no empty thought is added that is not there. The words after "assistant" and a newline are encoded
apart from it, which gives the same ids as both at once: the pieces of the vocabulary
(tools/train_tokenizer.py) ensure it.
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
    """Text that is one special token, not to be spelled out."""


def render_conversation(tokenizer: Tokenizer, messages: SequenceABC[Message]) -> Sequence:
    """Ids of a whole conversation; every assistant turn and its end are under the loss."""
    ids: list[int] = []
    mask: list[bool] = []

    def add(piece: list[int], supervised: bool) -> None:
        ids.extend(piece)
        mask.extend([supervised] * len(piece))

    for message in messages:
        answer = message["role"] == "assistant"
        add(_open_turn(tokenizer, "user" if message["role"] == "tool" else message["role"]), False)
        for piece in _pieces(message):
            add(tokenizer.encode_tag(piece) if isinstance(piece, Tag) else tokenizer.encode(piece),
                answer)  # fmt: skip
        add([tokenizer.im_end_id], answer)
        add(tokenizer.encode("\n"), False)
    return Sequence(ids, mask)


def render_prompt(tokenizer: Tokenizer, messages: SequenceABC[Message]) -> list[int]:
    """Ids of a conversation so far, with the assistant's turn opened."""
    return render_conversation(tokenizer, messages).ids + _open_turn(tokenizer, "assistant")


def _open_turn(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.im_start_id, *tokenizer.encode(role + "\n")]


def _pieces(message: Message) -> Iterator[str]:
    """The words of a turn, in stretches between tags, each encoded as one."""
    content, role = message["content"], message["role"]
    if role == "tool":
        yield from (Tag("<tool_response>"), f"\n{content}\n", Tag("</tool_response>"))
        return
    if role == "system" and message.get("tools"):
        lines = "".join("\n" + _json(tool) for tool in message["tools"])
        yield content + ("\n\n" if content else "") + f"# Tools\n<tools>{lines}\n</tools>"
        return
    before = ""
    if role == "assistant" and (thoughts := message.get("reasoning_content")):
        yield from (Tag("<think>"), f"\n{thoughts}\n", Tag("</think>"))
        before = "\n\n"
    text = before + content
    for number, call in enumerate(message.get("tool_calls") or () if role == "assistant" else ()):
        yield text + ("\n" if content or number else "")
        arguments = call["arguments"]
        spelled = arguments if isinstance(arguments, str) else _json(arguments)
        yield Tag("<tool_call>")
        yield f'\n{{"name": {_json(call["name"])}, "arguments": {spelled}}}\n'
        yield Tag("</tool_call>")
        text = ""
    yield text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
