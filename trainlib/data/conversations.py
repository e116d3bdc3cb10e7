"""Converters from rows, under our names (columns.py), to conversations and preference pairs.

A conversation is the list of messages that tokenizer/chat_format.py renders; messages.py converts
a single one. Every function raises ValueError with the reason if a row is broken, and NotUsed if
it is intact but has nothing for its stage to learn.
"""

import os
import re
from typing import Any

from trainlib.data.columns import EMPTY_CELLS, Fields
from trainlib.data.messages import (
    Messages,
    add_reasoning,
    assistant,
    check_text,
    is_false,
    parse_tools,
    read_turn,
    user,
)

HUMAN_ASSISTANT = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")
DIALOGUE = re.compile(r"(?:\A|\n)\s*(Human|Assistant): ?")
NO_INPUT = (*EMPTY_CELLS, "<noinput>", "无")  # No input in copies of Alpaca, in lower case.
SWITCHES = (*EMPTY_CELLS, "on", "off", "yes", "no", "true", "false")
"""Texts, in lower case, of a column "reasoning" that says whether the answer was reasoned."""
MIN_REPEATED = 20  # Characters from which a prompt at the start of both answers is no coincidence.


class NotUsed(Exception):  # noqa: N818
    """Raised for an intact row that has nothing for its stage to learn."""


def read_messages(turns: Any, field: str) -> Messages:
    """Convert turns with "role" and "content", or with "from" and "value", to messages."""
    if turns == []:
        raise NotUsed(f"{field} is empty")
    if not isinstance(turns, list):
        raise ValueError(f"{field} must be a list of messages, or its JSON text")
    messages: Messages = []
    for number, turn in enumerate(turns, 1):
        what = f"{field} message {number}"
        messages += read_turn(turn, what)
        tools = turn.get("tools") or turn.get("functions")
        messages = with_tools(messages, parse_tools(tools, what))
    return messages


def with_tools(messages: Messages, functions: list) -> Messages:
    """Return the messages with functions in the system message, which is added if missing.

    If its text already lists tools, it stays as it is. Raises ValueError for other functions.
    """
    if not functions:
        return messages
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    if "<tools>" in messages[0]["content"]:
        return messages
    if messages[0].get("tools", functions) != functions:
        raise ValueError("the row lists different tools in two places")
    return [{**messages[0], "tools": functions}, *messages[1:]]


def _with_row(messages: Messages, f: Fields) -> Messages:
    """Return the messages with the row's system message and tools, if they have none."""
    if messages[0]["role"] != "system" and (system := f.get("system")):
        text = check_text(system, f.what("system"))
        messages = [{"role": "system", "content": text}, *messages]
    return with_tools(messages, parse_tools(f.get("tools"), f.what("tools")))


# ---- conversations -------------------------------------------------------------------------------


def read_conversation(f: Fields, join: str) -> Messages:
    """Convert a row with messages, or with a prompt and an answer; `join` precedes its input."""
    if _is_bad(f):
        raise NotUsed("its label says that the answer is bad")
    if f.has("messages"):
        messages = _with_row(read_messages(f.parsed("messages"), f.what("messages")), f)
    else:
        prompt = read_prompt(f, join)
        messages = _join_answer(prompt, _read_answer(f, "answer"), f.what("answer"))
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        name = "messages" if f.has("messages") else "answer"
        raise NotUsed(f"{f.what(name)} has no assistant message")
    _require_targets(answers)
    return messages


def _is_bad(f: Fields) -> bool:
    """Return whether a label marks the answer as bad. A number can also be the class of a text."""
    label = f.get("label")
    if label is None or not is_false(label):
        return False
    names = [f.keys.get(name, "").strip().lower() for name in ("label", "prompt", "answer")]
    unpaired = names[0] == "kto_tag" or names[1:] == ["prompt", "completion"]
    return unpaired or str(label).strip().lower() == "false"


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
    question = _text(f, "prompt")
    if question.strip().startswith("Human:") and question.rstrip().endswith("\nAssistant:"):
        breaks = HUMAN_ASSISTANT if "\n\nAssistant:" in question else DIALOGUE
        return _with_row(_not_learned(_read_dialogue(question, breaks)[:-1]), f)
    extra = _text(f, "input") if f.get("input") else ""
    extra = "" if extra.strip().lower() in NO_INPUT else extra
    if not question.strip() and not extra.strip():
        raise NotUsed(f"{f.what('prompt')} is empty")
    question = user(question + (join if question and extra else "") + extra)
    return _with_row([*_read_history(f), question], f)


def _text(f: Fields, name: str) -> str:
    """Return a text or a number as text; raise ValueError for other values."""
    value = f.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return check_text(value, f.what(name))


def _not_learned(messages: Messages) -> Messages:
    """Return the messages of a prompt, whose answers are not learned; those of a history are."""
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]


def _read_history(f: Fields) -> Messages:
    """Convert [[question, answer], ...], or a list of messages."""
    if f.turns("history"):
        return read_messages(f.turns("history"), f.what("history"))
    history = f.parsed("history")
    if isinstance(history, str) and history.strip().lower() in EMPTY_CELLS:
        history = None
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"{f.what('history')} must be a list of questions and answers")
    messages: Messages = []
    for number, pair in enumerate(history or (), 1):
        field = f"{f.what('history')} {number}"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"{field} must be a question and its answer")
        messages += [user(check_text(pair[0], field)), assistant(check_text(pair[1], field))]
    return messages


def _read_dialogue(text: str, breaks: re.Pattern[str] = HUMAN_ASSISTANT) -> Messages:
    parts = breaks.split(text)
    return [user(words.strip()) if speaker == "Human" else assistant(words.strip())
            for speaker, words in zip(parts[1::2], parts[2::2], strict=True)]  # fmt: skip


def _read_answer(f: Fields, name: str) -> Messages:
    if f.turns(name):
        return read_messages(f.turns(name), f.what(name))
    content = listed if isinstance(listed := f.get(name), list) else _text(f, name)
    [message] = read_turn({"role": "assistant", "content": content}, f.what(name))
    thoughts = f.row.get(f.keys.get("reasoning", ""))
    if name == "answer" and isinstance(thoughts, str) and thoughts.strip().lower() not in SWITCHES:
        add_reasoning(message, f.get("reasoning"), f.what("reasoning"))
    return [message]


def _join_answer(prompt: Messages, answer: Messages, what: str) -> Messages:
    """Return a conversation of a prompt, possibly empty, and an answer, which may repeat it."""
    if prompt and answer[0]["role"] == "system" and not answer[0]["content"]:
        prompt, answer = with_tools(prompt, answer[0].get("tools", [])), answer[1:]
    if not prompt or answer[0]["role"] not in ("system", "user"):
        if prompt and prompt[-1]["role"] == "assistant":
            raise ValueError(f"the prompt, before {what}, must not end with an answer")
        return [*prompt, *answer]
    if answer[0]["role"] == "user" and prompt[0]["role"] == "system":
        answer = [prompt[0], *answer]
    earlier = [message["content"].strip() for message in answer[:-1]]
    if any(message["content"].strip() not in earlier for message in prompt):
        raise ValueError(f"{what} is a whole conversation, but does not contain the prompt")
    size, same = len(prompt), [message["content"] for message in prompt]
    begin = prompt if [message["content"] for message in answer[:size]] == same else answer[:size]
    return [*begin, *answer[size:]]


# ---- preferences ---------------------------------------------------------------------------------


def read_pair(f: Fields, join: str) -> tuple[Messages, Messages]:
    """Convert a row with a chosen and a rejected answer, and its prompt if it has one."""
    prompt: Messages = []
    if f.has("prompt"):
        prompt = read_prompt(f, join)
    elif f.has("messages"):
        prompt = _with_row(read_messages(f.parsed("messages"), f.what("messages")), f)
        if not f.has("chosen"):  # The last answer is the chosen one.
            rejected = [*prompt[:-1], *_read_answer(f, "rejected")]
            return make_pair(prompt, rejected)
    if not prompt and not f.turns("chosen") and not f.turns("rejected"):
        return _read_texts(f)
    repeated = prompt[-1]["content"] if f.has("prompt") and not f.turns("prompt") else ""
    texts = [f.get(name) for name in ("chosen", "rejected")]
    repeats = len(repeated) >= MIN_REPEATED and all(
        isinstance(text, str) and text.startswith(repeated) and text[len(repeated) :][:1].isspace()
        for text in texts
    )

    def conversation(name: str) -> Messages:
        answer = _read_answer(f, name)
        if repeats:
            answer = [assistant(f.get(name)[len(repeated) :].strip())]
        messages = _join_answer(prompt, answer, f.what(name))
        return messages if prompt else _with_row(messages, f)

    return make_pair(conversation("chosen"), conversation("rejected"))


def _read_texts(f: Fields) -> tuple[Messages, Messages]:
    """Convert two texts with Human: and Assistant: turns, or with the prompt as common prefix."""
    chosen, rejected = (check_text(f.get(n), f.what(n)) for n in ("chosen", "rejected"))
    if HUMAN_ASSISTANT.match(chosen) and HUMAN_ASSISTANT.match(rejected):
        return make_pair(*(_with_row(_read_dialogue(text), f) for text in (chosen, rejected)))
    ours = set(f.keys.values())
    if others := [k for k, _ in f.unused() if isinstance(f.row.get(k), str) and k not in ours]:
        raise ValueError(f"no prompt, but other columns ({', '.join(others)}). If one is the "
                         f'prompt, set "data.columns=[prompt:{others[0]}]"')  # fmt: skip
    shared = len(os.path.commonprefix([chosen, rejected]))
    while shared and not chosen[shared - 1].isspace():
        shared -= 1  # Back to the start of a word.
    if not chosen[:shared].strip():
        raise ValueError('"chosen" and "rejected" have no common prefix to use as the prompt')
    prompt = _with_row([user(chosen[:shared].strip())], f)
    return make_pair([*prompt, assistant(chosen[shared:])], [*prompt, assistant(rejected[shared:])])


def make_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages]:
    """Return two conversations that begin with the same prompt, in which no answer is learned.

    Raises ValueError without a common prompt or an answer at the end, NotUsed if both are equal.
    """
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError(f'"{name}" has no assistant message to learn from')
        if messages[-1]["role"] != "assistant":
            raise ValueError(f'"{name}" must end with an assistant message')
    if chosen == rejected:
        raise NotUsed('"chosen" and "rejected" are the same answer')
    size = prompt_size(chosen, rejected)
    if all(message["role"] != "user" for message in chosen[:size]):
        raise ValueError('"chosen" and "rejected" have different prompts, or none')
    for messages in (chosen, rejected):
        answers = [m for m in messages[size:] if m["role"] == "assistant"]
        _require_targets(answers, "an answer of the pair")
        messages[:size] = _not_learned(messages[:size])
    return chosen, rejected


def prompt_size(chosen: Messages, rejected: Messages) -> int:
    """Return the number of messages in the common prompt; at least the last answer is not in it."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b),
                min(len(chosen), len(rejected)) - 1)  # fmt: skip
