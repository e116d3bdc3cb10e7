"""Rows of conversations and preferences as the field writes them, to messages as we render them.

The normal form is a list of messages, each {"role", "content"} with "reasoning_content" and
"tool_calls" of an assistant's and "tools" of the first, a system message, where there are any
(tokenizer/chat_format.py). Every function raises ValueError with the reason for a broken row.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
from typing import Any

from tokenizer.chat_format import ROLES
from trainlib.data.containers import GBK_CURE, Row, json_type, looks_like_gbk

Messages = list[dict[str, Any]]
SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "function_call": "function_call",
    "observation": "tool", "function": "tool", "function_response": "tool",
    "developer": "system", "ipython": "tool",
}  # fmt: skip
"""Other names of the roles; a function_call is an assistant's turn that holds a call alone."""
THOUGHTS = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)


def user(content: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    """An assistant's message; thoughts that lead its content go where they belong."""
    thoughts = THOUGHTS.match(content)
    if not thoughts:
        return {"role": "assistant", "content": content}
    message: dict[str, Any] = {"role": "assistant", "content": content[thoughts.end() :]}
    if thoughts[1].strip():
        message["reasoning_content"] = thoughts[1]
    return message


def check_text(value: Any, what: str) -> str:
    """The text itself; raises ValueError for no text, or half of a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, not {json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # How a byte that is no UTF-8 comes out of a text stream.
            byte = f"perhaps the byte {code - 0xDC00:#04x} of a file that is not UTF-8"
            if looks_like_gbk(value.encode("utf-8", "surrogateescape")):
                byte += f", which {GBK_CURE}"
        else:
            byte = "which no tokenizer can encode"
        raise ValueError(
            f"{what}: character {error.start} is half of a surrogate pair "
            f"({value[error.start]!r}), {byte}"
        ) from error
    return value


def read_messages(turns: Any, place: str, tools: Any = None, system: Any = None) -> Messages:
    """Turns of role and content, or from and value, in the normal form."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{place} must be a list of messages with at least one")
    messages = [_message(turn, f"{place} message {n}") for n, turn in enumerate(turns, 1)]
    tools = tools or turns[0].get("tools")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_text(system, '"system"')})
    functions = _decode(tools, '"tools"') if tools else []
    if functions:
        if not isinstance(functions, list) or not all(isinstance(f, dict) for f in functions):
            raise ValueError('"tools" must be a list of objects, or such a list as JSON')
        check_text(json.dumps(functions, ensure_ascii=False), '"tools"')
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = functions
    return messages


def answered(messages: Messages, place: str) -> Messages:
    """The same messages; raises ValueError where no assistant speaks."""
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{place} has no assistant message, so nothing to learn")
    return messages


def _message(turn: Any, place: str) -> dict[str, Any]:
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        turn = {**turn, "role": turn["from"], "content": turn.get("value")}
    if not isinstance(turn, dict) or "role" not in turn:
        raise ValueError(f'{place} must be an object with "role" and "content"')
    role = turn["role"]
    role = SPEAKERS.get(role, role) if isinstance(role, str) else role
    calls = turn.get("tool_calls")
    content = turn.get("content")
    if role == "function_call":
        role, calls, content = "assistant", content, ""
    if role not in ROLES:
        raise ValueError(f"{place}: role {turn['role']!r} is none of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _join_parts(content, place)
    thoughts = turn.get("reasoning_content")
    if content is None and (calls or thoughts):
        content = ""
    content = check_text(content, f'{place}: "content"')
    if role != "assistant":
        return {"role": role, "content": content}
    message: dict[str, Any] = assistant(content)
    if thoughts:
        thoughts = check_text(thoughts, f'{place}: "reasoning_content"')
        message = {"role": role, "content": content, "reasoning_content": thoughts}
    if calls and (read := _read_calls(calls, place)):
        message["tool_calls"] = read
    return message


def _join_parts(parts: list, place: str) -> str:
    """Content in parts, each {"type": "text", "text"}."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else json_type(part)
            raise ValueError(f"{place}: a part of type {kind!r}, where only text can be read")
        texts.append(check_text(part.get("text"), f'{place}: "text" of a part'))
    return "".join(texts)


def _read_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """[{"name", "arguments"}] of a list, an object, or either as JSON; a "function" is unpacked."""
    calls = _decode(calls, f'{place}: "tool_calls"')
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f'{place}: a tool call must be an object with "name" and "arguments"')
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # No JSON stays a text.
                arguments = json.loads(arguments)
        call = {"name": call["name"], "arguments": {} if arguments is None else arguments}
        check_text(json.dumps(call, ensure_ascii=False), f"{place}: a tool call")
        read.append(call)
    return read


def _decode(value: Any, place: str) -> Any:
    """A value, or the JSON of one."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return []
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is a string, but not JSON: {value[:60]!r}") from error


# ---- conversations -------------------------------------------------------------------------------


def read_chat(row: Row, key: str) -> Messages:
    """A list of messages under `key`, with "tools" and "system" beside it."""
    return answered(_list(row, key), f'"{key}"')


def _list(row: Row, key: str) -> Messages:
    return read_messages(row[key], f'"{key}"', row.get("tools"), row.get("system"))


def read_alpaca(row: Row, join: str) -> Messages:
    """instruction, input, output, system and history; `join` stands before the input."""
    answer = row["output"] if "output" in row else row["response"]
    return [*alpaca_prompt(row, join), assistant(check_text(answer, '"output"'))]


def alpaca_prompt(row: Row, join: str) -> Messages:
    """All of an Alpaca row but its answer."""
    messages = [*_system(row), *_history(row.get("history"))]
    question = check_text(row["instruction"], '"instruction"')
    more = check_text(row.get("input") or "", '"input"')
    return [*messages, user(question + (join if question and more else "") + more)]


def _system(row: Row) -> Messages:
    """Return the system message of a row as a list, empty without one."""
    text = row.get("system")
    return [{"role": "system", "content": check_text(text, '"system"')}] if text else []


def read_question_answer(row: Row) -> Messages:
    """q, a and history."""
    return [*_history(row.get("history")), user(check_text(row["q"], '"q"')),
            assistant(check_text(row["a"], '"a"'))]  # fmt: skip


def _history(history: Any) -> Messages:
    if isinstance(history, str):
        if not history.strip():
            return []
        try:
            history = ast.literal_eval(history)  # CSV holds what Python printed, or JSON.
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            history = _decode(history, '"history"')
    messages: Messages = []
    for number, pair in enumerate(history or (), 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f'"history" {number} must be a question and its answer')
        place = f'"history" {number}'
        messages += [user(check_text(pair[0], place)), assistant(check_text(pair[1], place))]
    return messages


def read_prompt_completion(row: Row) -> Messages:
    """prompt and completion, each a text or a list of messages."""
    return answered([*_prompt(row), *_answer(row, "completion")], '"completion"')


def _prompt(row: Row) -> Messages:
    if isinstance(row["prompt"], str):
        return [*_system(row), user(check_text(row["prompt"], '"prompt"'))]
    return _list(row, "prompt")


def _answer(row: Row, key: str) -> Messages:
    value = row[key]
    if isinstance(value, str):
        return [assistant(check_text(value, f'"{key}"'))]
    return read_messages([value] if isinstance(value, dict) else value, f'"{key}"')


# ---- preferences ---------------------------------------------------------------------------------


def read_preference(row: Row) -> tuple[Messages, Messages]:
    """chosen and rejected as messages, after a prompt or with it as their shared beginning."""

    def whole(key: str) -> Messages:
        answer = read_messages(row[key], f'"{key}"', row.get("tools"))
        if not row.get("prompt") or answer[0]["role"] in ("user", "system"):
            return answer
        return [*_prompt(row), *answer]

    return compare(whole("chosen"), whole("rejected"))


def read_prompt_preference(row: Row) -> tuple[Messages, Messages]:
    """prompt, and chosen and rejected as texts."""
    return _answer_both(_prompt(row), row)


def read_alpaca_preference(row: Row, join: str) -> tuple[Messages, Messages]:
    """instruction, input, and chosen and rejected as texts."""
    return _answer_both(alpaca_prompt(row, join), row)


def read_sharegpt_preference(row: Row) -> tuple[Messages, Messages]:
    """conversations, and chosen and rejected as single messages that answer them."""
    key = "conversations" if "conversations" in row else "messages"
    return _answer_both(_list(row, key), row)


def _answer_both(prompt: Messages, row: Row) -> tuple[Messages, Messages]:
    """Return the prompt with each of its answers, chosen and rejected."""
    return compare([*prompt, *_answer(row, "chosen")], [*prompt, *_answer(row, "rejected")])


def read_text_preference(row: Row) -> tuple[Messages, Messages]:
    """chosen and rejected as texts: turns of Human: and Assistant:, or a shared beginning."""
    chosen = check_text(row["chosen"], '"chosen"')
    rejected = check_text(row["rejected"], '"rejected"')
    marks = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")
    if marks.match(chosen) and marks.match(rejected):
        return compare(*([
            user(text.strip()) if speaker == "Human" else assistant(text.strip())
            for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
        ] for parts in (marks.split(chosen), marks.split(rejected))))  # fmt: skip
    shared = len(os.path.commonprefix([chosen, rejected]))
    while shared and not chosen[shared - 1].isspace():
        shared -= 1  # Back to the end of a word.
    if not chosen[:shared].strip():
        raise ValueError('"chosen" and "rejected" share no beginning that could be their prompt')
    prompt = user(chosen[:shared].strip())
    return compare([prompt, assistant(chosen[shared:])], [prompt, assistant(rejected[shared:])])


def compare(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages]:
    """The pair; raises ValueError unless only the last answer differs."""
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if answered(messages, f'"{key}"')[-1]["role"] != "assistant":
            raise ValueError(f'"{key}" must end with an assistant message')
    if chosen[:-1] != rejected[:-1]:
        raise ValueError('"chosen" and "rejected" have different prompts (all but the last turn)')
    if chosen[-1] == rejected[-1]:
        raise ValueError('"chosen" and "rejected" are the same answer')
    return chosen, rejected
