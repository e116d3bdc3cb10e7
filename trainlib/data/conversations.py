"""Converters from rows, under our names (columns.py), to conversations and preference pairs.

A conversation is the list of messages that tokenizer/chat_format.py renders; messages.py converts
a single one. Every function raises ValueError with the reason if a row is broken, and NotUsed if
it is intact but has nothing for its stage to learn.
"""

from __future__ import annotations

import os
import re
from typing import Any

from trainlib.data.columns import Fields
from trainlib.data.messages import (
    Messages,
    add_reasoning,
    assistant,
    check_text,
    parse_tools,
    read_turn,
    user,
)

HUMAN_ASSISTANT = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")


class NotUsed(Exception):  # noqa: N818
    """Raised for an intact row that has nothing for its stage to learn."""


def read_messages(turns: Any, field: str) -> Messages:
    """Convert turns with "role" and "content", or with "from" and "value", to messages."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{field} must be a non-empty list of messages, or its JSON text")
    messages = [
        message
        for number, turn in enumerate(turns, 1)
        for message in read_turn(turn, f"{field} message {number}")
    ]
    found: list = []
    for number, turn in enumerate(turns, 1):
        what = f"{field} message {number}"
        tools = parse_tools(turn.get("tools") or turn.get("functions"), what)
        if found and tools and tools != found:
            raise ValueError(f"{what} has other tools than an earlier message")
        found = tools or found
    return with_tools(messages, found)


def with_tools(messages: Messages, functions: list) -> Messages:
    """Return the messages with functions in the system message, which is added if missing.

    A system message whose text already lists the tools stays as it is.
    """
    if not functions or "<tools>" in messages[0]["content"]:
        return messages
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    return [{**messages[0], "tools": functions}, *messages[1:]]


def _with_row(messages: Messages, f: Fields) -> Messages:
    """Return the messages with the row's system message and tools, if they have none."""
    if messages[0]["role"] != "system" and (system := f.get("system")):
        text = check_text(system, f.what("system"))
        messages = [{"role": "system", "content": text}, *messages]
    return with_tools(messages, parse_tools(f.get("tools"), f.what("tools")))


# ---- conversations -------------------------------------------------------------------------------


def read_conversation(f: Fields, join: str) -> Messages:
    """Convert a row with messages, or with a prompt and an answer.

    `join` separates an instruction and its input. In a prompt, assistant turns are not learned,
    except those of an Alpaca history.
    """
    if f.get("label") in (False, "false", "False", "FALSE", "0"):
        raise NotUsed("its label says that the answer is bad")
    if f.has("messages"):
        messages = _with_row(read_messages(f.parsed("messages"), f.what("messages")), f)
    else:
        messages = [*read_prompt(f, join), *_read_answer(f, "answer")]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        name = "messages" if f.has("messages") else "answer"
        raise ValueError(f"{f.what(name)} has no assistant message to learn from")
    _require_targets(answers)
    return messages


def _require_targets(answers: Messages, what: str = "every answer") -> None:
    """Mark empty answers as not learned; raise NotUsed if none is learned."""
    marked = sum(message.get("weight") == 0 for message in answers)
    for message in answers:
        if not message["content"].strip() and "tool_calls" not in message:
            if not message.get("reasoning_content", "").strip():
                message["weight"] = 0
    if all(message.get("weight") == 0 for message in answers):
        reason = "marked as not to be learned" if marked == len(answers) else "empty"
        raise NotUsed(f"{what} is {reason}")


def read_prompt(f: Fields, join: str) -> Messages:
    """Convert a prompt: a list of messages, or a text with an optional input and history."""
    if f.turns("prompt"):
        messages = read_messages(f.turns("prompt"), f.what("prompt"))
        return _with_row(_not_learned(messages), f)
    question = check_text(f.get("prompt"), f.what("prompt"))
    if HUMAN_ASSISTANT.match(question) and question.rstrip().endswith("\n\nAssistant:"):
        return _with_row(_not_learned(_read_dialogue(question)[:-1]), f)
    extra = check_text(f.get("input") or "", f.what("input"))
    question = user(question + (join if question and extra else "") + extra)
    return _with_row([*_read_history(f), question], f)


def _not_learned(messages: Messages) -> Messages:
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def _read_history(f: Fields) -> Messages:
    """Convert [[question, answer], ...], or a list of messages."""
    if f.turns("history"):
        return read_messages(f.turns("history"), f.what("history"))
    history = f.parsed("history")
    if isinstance(history, str) and history.strip().lower() in ("", "nan", "none", "null"):
        history = None  # As pandas and CSV writers leave empty cells.
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"{f.what('history')} must be a list of questions and answers")
    messages: Messages = []
    for number, pair in enumerate(history or (), 1):
        field = f"{f.what('history')} {number}"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"{field} must be a question and its answer")
        messages += [user(check_text(pair[0], field)), assistant(check_text(pair[1], field))]
    return messages


def _read_dialogue(text: str) -> Messages:
    """Convert a text with Human: and Assistant: turns."""
    parts = HUMAN_ASSISTANT.split(text)
    return [
        user(words.strip()) if speaker == "Human" else assistant(words.strip())
        for speaker, words in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _read_answer(f: Fields, name: str) -> Messages:
    if f.turns(name):
        return read_messages(f.turns(name), f.what(name))
    [message] = read_turn({"role": "assistant", "content": f.get(name)}, f.what(name))
    if name == "answer":
        add_reasoning(message, f.get("reasoning"), f.what("reasoning"))
    return [message]


# ---- preferences ---------------------------------------------------------------------------------


def read_pair(f: Fields, join: str) -> tuple[Messages, Messages]:
    """Convert a row with a chosen and a rejected answer, and its prompt if it has one.

    Without a prompt, a row of texts is refused if it has another key with a text.
    """
    prompt: Messages = []
    if f.has("prompt"):
        prompt = read_prompt(f, join)
    elif f.has("messages"):
        prompt = _with_row(read_messages(f.parsed("messages"), f.what("messages")), f)
    if not prompt and not f.turns("chosen") and not f.turns("rejected"):
        return _read_texts(f)
    repeated = prompt[-1]["content"] if f.has("prompt") and not f.turns("prompt") else ""
    texts = [f.get(name) for name in ("chosen", "rejected")]
    repeats = all(isinstance(text, str) and text.startswith(repeated) for text in texts)

    def conversation(name: str) -> Messages:
        answer = _read_answer(f, name)
        if repeats and repeated:
            answer = [assistant(f.get(name)[len(repeated) :].strip())]
        whole = answer[0]["role"] in ("system", "user")  # Such a list repeats the prompt.
        earlier = [message["content"].strip() for message in answer[:-1]]
        if whole and any(m["content"].strip() not in earlier for m in _questions(prompt)):
            raise ValueError(
                f"{f.what(name)} starts with a user's turn, but does not contain the prompt"
            )
        if whole and prompt and answer[0]["role"] != "system" and prompt[0]["role"] == "system":
            answer = [prompt[0], *answer]
        if prompt and not whole and prompt[-1]["role"] == "assistant":
            raise ValueError(f"the prompt, before {f.what(name)}, must not end with an answer")
        return _with_row(answer, f) if whole or not prompt else [*prompt, *answer]

    return make_pair(conversation("chosen"), conversation("rejected"))


def _questions(messages: Messages) -> Messages:
    return [message for message in messages if message["role"] == "user"]


def _read_texts(f: Fields) -> tuple[Messages, Messages]:
    """Convert two texts with Human: and Assistant: turns, or with the prompt as common prefix."""
    chosen, rejected = (check_text(f.get(n), f.what(n)) for n in ("chosen", "rejected"))
    if HUMAN_ASSISTANT.match(chosen) and HUMAN_ASSISTANT.match(rejected):
        return make_pair(*(_with_row(_read_dialogue(text), f) for text in (chosen, rejected)))
    if others := [key for key, _ in f.unused() if isinstance(f.row.get(key), str)]:
        raise ValueError(
            f"no prompt, but other columns ({', '.join(others)}). If one is the prompt, set "
            f'"data.columns=[prompt:{others[0]}]"'
        )
    shared = len(os.path.commonprefix([chosen, rejected]))
    while shared and not chosen[shared - 1].isspace():
        shared -= 1  # Back to the start of a word.
    if not chosen[:shared].strip():
        raise ValueError('"chosen" and "rejected" have no common prefix to use as the prompt')
    prompt = user(chosen[:shared].strip())
    return make_pair([prompt, assistant(chosen[shared:])], [prompt, assistant(rejected[shared:])])


def make_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages]:
    """Return two conversations that begin with the same prompt, in which no answer is learned.

    After it, the assistant's turns are learned. Raises ValueError if there is no common prompt, if
    both are equal, or if one does not end with an answer.
    """
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError(f'"{name}" has no assistant message to learn from')
        if messages[-1]["role"] != "assistant":
            raise ValueError(f'"{name}" must end with an assistant message')
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same answer')
    size = prompt_size(chosen, rejected)
    if all(message["role"] != "user" for message in chosen[:size]):
        raise ValueError('"chosen" and "rejected" have different prompts, or none')
    for messages in (chosen, rejected):
        answers = [m for m in messages[size:] if m["role"] == "assistant"]
        _require_targets(answers, "an answer of the pair")
    return (
        [*_not_learned(chosen[:size]), *chosen[size:]],
        [*_not_learned(rejected[:size]), *rejected[size:]],
    )


def prompt_size(chosen: Messages, rejected: Messages) -> int:
    """Return the number of messages in the common prompt; at least the last answer is not in it."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b),
                min(len(chosen), len(rejected)) - 1)  # fmt: skip
