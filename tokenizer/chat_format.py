r"""Chat format: messages to ids and loss mask in one pass, for training, chat and serving.

The format is ChatML. An assistant's content and end of turn (underlined) are supervised:

    <|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n您好<|im_end|>\n
                                                             ----__________

A message is a dict with "role" (system, user, assistant, tool) and "content" (text). Optional keys:

    tools               system message: a list of JSON objects, appended one per line
    reasoning_content   assistant: reasoning, between <think> and </think> before the content
    enable_thinking     assistant: False = answered without reasoning, so the tags hold nothing
    tool_calls          assistant: [{"name", "arguments"}], each between <tool_call> tags
    weight              assistant: 0 = the turn is not supervised

Reasoning and calls are supervised. A tool's answer (a user turn between <tool_response> tags) is
not, nor are tags that hold nothing. No default system message is added. The text between two
special tokens is encoded at once, as transformers encodes the chat template. In the vocabulary of
tools/train_tokenizer.py, "assistant\n" never merges with the content.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceABC
from os.path import commonprefix
from typing import Any

from tokenizer.bpe import Sequence, Tokenizer

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")


class Tag(str):
    """The text of a special token, to be encoded as its id."""


NO_THOUGHTS = (Tag("<think>"), "\n\n", Tag("</think>"), "\n\n")


def render_conversation(tokenizer: Tokenizer, messages: SequenceABC[Message]) -> Sequence:
    """Return the ids of a conversation; assistant turns and their end tokens are supervised."""
    ids, mask = array(tokenizer.typecode), bytearray()
    newline = _encode(tokenizer, ["\n"])
    for message in messages:
        thinking = message.get("enable_thinking") is not False or message.get("reasoning_content")
        pieces = _opening(message["role"], bool(thinking))
        opening = _encode(tokenizer, pieces).tolist()
        turn = _encode(tokenizer, (*pieces, *message_pieces(message)))
        # Every id after the opening is supervised. An id that includes the last newlines of the
        # opening and the first newlines of the content is supervised too.
        start = 1 + len(commonprefix([turn[: len(opening)].tolist(), opening]))
        turn.insert(0, tokenizer.im_start_id)
        turn.append(tokenizer.im_end_id)
        ids += turn
        ids += newline
        supervised = message["role"] == "assistant" and message.get("weight") != 0
        mask += bytes(start) + bytes([supervised]) * (len(turn) - start) + bytes(len(newline))
    return Sequence(ids, mask)


def render_prompt(tokenizer: Tokenizer, messages: SequenceABC[Message],
                  enable_thinking: bool = True) -> list[int]:  # fmt: skip
    """Return the ids of a conversation, followed by the start of an assistant turn."""
    opening = _encode(tokenizer, _opening("assistant", enable_thinking))
    return [*render_conversation(tokenizer, messages).ids, tokenizer.im_start_id, *opening]


def _opening(role: str, thinking: bool) -> tuple[str, ...]:
    """Return the start of a turn, up to what the assistant generates."""
    empty = NO_THOUGHTS if role == "assistant" and not thinking else ()
    return (("user" if role == "tool" else role) + "\n", *empty)


def _encode(tokenizer: Tokenizer, pieces: Iterable[str]) -> "array[int]":
    """Return the ids of texts and tags; the texts between two tags are encoded at once."""
    ids, text = array(tokenizer.typecode), ""
    for piece in pieces:
        tag = tokenizer.tag_id(piece) if isinstance(piece, Tag) else None
        if tag is None:  # A tag that the vocabulary lacks merges with the text around it.
            text += piece
        else:
            ids += tokenizer.encode_array(text)
            ids.append(tag)
            text = ""
    return ids + tokenizer.encode_array(text)


def message_pieces(message: Message) -> Iterator[str]:
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
