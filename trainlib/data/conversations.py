"""Converters from all known row formats to conversations and preference pairs.

A conversation is the list of messages that tokenizer/chat_format.py renders: {"role", "content"},
optionally with "reasoning_content" and "tool_calls" (assistant) or "tools" (leading system
message). Every function raises ValueError with the reason if a row is broken.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
from typing import Any

from tokenizer.chat_format import ROLES
from trainlib.data.containers import GBK_FIX, Row, json_type, looks_like_gbk

Messages = list[dict[str, Any]]
ROLE_ALIASES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "function_call": "function_call",
    "observation": "tool", "function": "tool", "function_response": "tool",
    "developer": "system", "ipython": "tool",
}  # fmt: skip
"""Other names for roles; a function_call is an assistant turn that contains only a call."""
THOUGHTS = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)


def user(content: str) -> dict[str, Any]:
    """Return a user message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    """Return an assistant message; a leading <think> part becomes "reasoning_content"."""
    thoughts = THOUGHTS.match(content)
    message = {"role": "assistant", "content": content[thoughts.end() :] if thoughts else content}
    if thoughts and thoughts[1].strip():
        message["reasoning_content"] = thoughts[1]
    return message


def check_text(value: Any, what: str) -> str:
    """Return a string unchanged; raise ValueError for other types and unpaired surrogates."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, not {json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # How surrogateescape decodes an invalid byte.
            reason = f"possibly byte {code - 0xDC00:#04x} in a file that is not UTF-8"
            if looks_like_gbk(value.encode("utf-8", "surrogateescape")):
                reason += f", which {GBK_FIX}"
        else:
            reason = "which no tokenizer can encode"
        raise ValueError(
            f"{what}: character {error.start} is half of a surrogate pair "
            f"({value[error.start]!r}), {reason}"
        ) from error
    return value


def read_messages(turns: Any, field: str, tools: Any = None, system: Any = None) -> Messages:
    """Convert turns with "role" and "content", or with "from" and "value", to messages."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{field} must be a non-empty list of messages")
    messages = [_read_message(turn, f"{field} message {n}") for n, turn in enumerate(turns, 1)]
    tools = tools or turns[0].get("tools")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_text(system, '"system"')})
    functions = _parse_json(tools, '"tools"') if tools else []
    if functions:
        if not isinstance(functions, list) or not all(isinstance(f, dict) for f in functions):
            raise ValueError('"tools" must be a list of objects, or a JSON string of such a list')
        check_text(json.dumps(functions, ensure_ascii=False), '"tools"')
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = functions
    return messages


def require_answer(messages: Messages, field: str) -> Messages:
    """Return the messages; raise ValueError if none is from the assistant."""
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{field} has no assistant message to learn from")
    return messages


def _read_message(turn: Any, field: str) -> dict[str, Any]:
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        turn = {**turn, "role": turn["from"], "content": turn.get("value")}
    if not isinstance(turn, dict) or "role" not in turn:
        raise ValueError(f'{field} must be an object with "role" and "content"')
    role = turn["role"]
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    calls = turn.get("tool_calls")
    content = turn.get("content")
    if role == "function_call":
        role, calls, content = "assistant", content, ""
    if role not in ROLES:
        raise ValueError(f"{field}: role {turn['role']!r} is not one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _join_parts(content, field)
    thoughts = turn.get("reasoning_content")
    if content is None and (calls or thoughts):
        content = ""
    content = check_text(content, f'{field}: "content"')
    if role != "assistant":
        return {"role": role, "content": content}
    message: dict[str, Any] = assistant(content)
    if thoughts:
        thoughts = check_text(thoughts, f'{field}: "reasoning_content"')
        message = {"role": role, "content": content, "reasoning_content": thoughts}
    if calls and (tool_calls := _read_calls(calls, field)):
        message["tool_calls"] = tool_calls
    return message


def _join_parts(parts: list, field: str) -> str:
    """Join content that is given as a list of {"type": "text", "text": ...} parts."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            type_ = part.get("type") if isinstance(part, dict) else json_type(part)
            raise ValueError(f"{field}: content part of type {type_!r}; only text is supported")
        texts.append(check_text(part.get("text"), f'{field}: "text" of a content part'))
    return "".join(texts)


def _read_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    """Convert one call or a list of calls, parsed or a JSON string, to [{"name", "arguments"}]."""
    calls = _parse_json(calls, f'{field}: "tool_calls"')
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f'{field}: a tool call must be an object with "name" and "arguments"')
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # Otherwise it stays a string.
                arguments = json.loads(arguments)
        call = {"name": call["name"], "arguments": {} if arguments is None else arguments}
        check_text(json.dumps(call, ensure_ascii=False), f"{field}: a tool call")
        result.append(call)
    return result


def _parse_json(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return []
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field} is a string but not JSON: {value[:60]!r}") from error


# ---- conversations -------------------------------------------------------------------------------


def read_chat(row: Row, key: str) -> Messages:
    """Convert the messages in row[key], with "tools" and "system" from the same row."""
    return require_answer(_read_messages_of(row, key), f'"{key}"')


def _read_messages_of(row: Row, key: str) -> Messages:
    return read_messages(row[key], f'"{key}"', row.get("tools"), row.get("system"))


def read_alpaca(row: Row, join: str) -> Messages:
    """Convert an Alpaca row; `join` separates the instruction and the input."""
    answer = row["output"] if "output" in row else row["response"]
    return [*alpaca_prompt(row, join), assistant(check_text(answer, '"output"'))]


def alpaca_prompt(row: Row, join: str) -> Messages:
    """Convert an Alpaca row without its answer."""
    messages = [*_read_system(row), *_read_history(row.get("history"))]
    question = check_text(row["instruction"], '"instruction"')
    extra = check_text(row.get("input") or "", '"input"')
    return [*messages, user(question + (join if question and extra else "") + extra)]


def _read_system(row: Row) -> Messages:
    """Return the system message of a row as a list, which is empty if the row has none."""
    text = row.get("system")
    return [{"role": "system", "content": check_text(text, '"system"')}] if text else []


def read_question_answer(row: Row) -> Messages:
    """Convert a row with "q", "a" and an optional "history"."""
    return [*_read_history(row.get("history")), user(check_text(row["q"], '"q"')),
            assistant(check_text(row["a"], '"a"'))]  # fmt: skip


def _read_history(history: Any) -> Messages:
    if isinstance(history, str):
        try:
            history = ast.literal_eval(history)  # In CSV it is a Python literal or JSON.
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            history = _parse_json(history, '"history"')
    messages: Messages = []
    for number, pair in enumerate(history or (), 1):
        field = f'"history" {number}'
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"{field} must be a question and its answer")
        messages += [user(check_text(pair[0], field)), assistant(check_text(pair[1], field))]
    return messages


def read_prompt_completion(row: Row) -> Messages:
    """Convert a prompt and a completion, each a string or a list of messages."""
    return require_answer([*_read_prompt(row), *_read_answer(row, "completion")], '"completion"')


def _read_prompt(row: Row) -> Messages:
    if isinstance(row["prompt"], str):
        return [*_read_system(row), user(check_text(row["prompt"], '"prompt"'))]
    return _read_messages_of(row, "prompt")


def _read_answer(row: Row, key: str) -> Messages:
    value = row[key]
    if isinstance(value, str):
        return [assistant(check_text(value, f'"{key}"'))]
    return read_messages([value] if isinstance(value, dict) else value, f'"{key}"')


# ---- preferences ---------------------------------------------------------------------------------


def read_preference(row: Row) -> tuple[Messages, Messages]:
    """Convert a pair of message lists; the prompt is part of each list or a separate field."""

    def conversation(key: str) -> Messages:
        answer = read_messages(row[key], f'"{key}"', row.get("tools"))
        if not row.get("prompt") or answer[0]["role"] in ("user", "system"):
            return answer
        return [*_read_prompt(row), *answer]

    return check_pair(conversation("chosen"), conversation("rejected"))


def read_prompt_preference(row: Row) -> tuple[Messages, Messages]:
    """Convert a prompt with two strings, chosen and rejected."""
    return _answer_pair(_read_prompt(row), row)


def read_alpaca_preference(row: Row, join: str) -> tuple[Messages, Messages]:
    """Convert an instruction and input with two strings, chosen and rejected."""
    return _answer_pair(alpaca_prompt(row, join), row)


def read_sharegpt_preference(row: Row) -> tuple[Messages, Messages]:
    """Convert a conversation with two possible next messages, chosen and rejected."""
    key = "conversations" if "conversations" in row else "messages"
    return _answer_pair(_read_messages_of(row, key), row)


def _answer_pair(prompt: Messages, row: Row) -> tuple[Messages, Messages]:
    chosen, rejected = ([*prompt, *_read_answer(row, key)] for key in ("chosen", "rejected"))
    return check_pair(chosen, rejected)


def read_text_preference(row: Row) -> tuple[Messages, Messages]:
    """Convert two strings with Human: and Assistant: turns, or with the prompt as common prefix."""
    chosen = check_text(row["chosen"], '"chosen"')
    rejected = check_text(row["rejected"], '"rejected"')
    marks = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")
    if marks.match(chosen) and marks.match(rejected):
        return check_pair(*([
            user(text.strip()) if speaker == "Human" else assistant(text.strip())
            for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
        ] for parts in (marks.split(chosen), marks.split(rejected))))  # fmt: skip
    shared = len(os.path.commonprefix([chosen, rejected]))
    while shared and not chosen[shared - 1].isspace():
        shared -= 1  # Back to the start of a word.
    if not chosen[:shared].strip():
        raise ValueError('"chosen" and "rejected" have no common prefix to use as the prompt')
    prompt = user(chosen[:shared].strip())
    return check_pair([prompt, assistant(chosen[shared:])], [prompt, assistant(rejected[shared:])])


def check_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages]:
    """Return the pair; raise ValueError unless it differs in the last answer and nothing else."""
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if require_answer(messages, f'"{key}"')[-1]["role"] != "assistant":
            raise ValueError(f'"{key}" must end with an assistant message')
    if chosen[:-1] != rejected[:-1]:
        raise ValueError('"chosen" and "rejected" have different prompts (all turns but the last)')
    if chosen[-1] == rejected[-1]:
        raise ValueError('"chosen" and "rejected" are the same answer')
    return chosen, rejected
