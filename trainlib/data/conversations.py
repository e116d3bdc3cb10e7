"""Conversations and preference pairs: rows of all known formats, converted to one.

That one is the list of messages that tokenizer/chat_format.py renders: {"role", "content"}, for an
assistant also "reasoning_content" and "tool_calls", for a leading system message "tools". Every
function raises ValueError with the reason if a row is broken.
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
"""Other names of the roles; a function_call is an assistant turn with nothing but a call."""
THOUGHTS = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)


def user(content: str) -> dict[str, Any]:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    """Return a message of the assistant; a leading <think> part becomes "reasoning_content"."""
    thoughts = THOUGHTS.match(content)
    message = {"role": "assistant", "content": content[thoughts.end() :] if thoughts else content}
    if thoughts and thoughts[1].strip():
        message["reasoning_content"] = thoughts[1]
    return message


def check_text(value: Any, what: str) -> str:
    """Return a text; raises ValueError for another type, or half of a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, not {json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # The surrogateescape handler makes these of a wrong byte.
            reason = f"perhaps the byte {code - 0xDC00:#04x} of a file that is not UTF-8"
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
    """Convert turns of role and content, or of from and value, to messages."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{field} must be a list of messages with at least one")
    messages = [_read_message(turn, f"{field} message {n}") for n, turn in enumerate(turns, 1)]
    tools = tools or turns[0].get("tools")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_text(system, '"system"')})
    functions = _parse_json(tools, '"tools"') if tools else []
    if functions:
        if not isinstance(functions, list) or not all(isinstance(f, dict) for f in functions):
            raise ValueError('"tools" must be a list of objects, or such a list as JSON')
        check_text(json.dumps(functions, ensure_ascii=False), '"tools"')
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = functions
    return messages


def require_answer(messages: Messages, field: str) -> Messages:
    """Return the messages; raises ValueError if none is of the assistant."""
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{field} has no assistant message, so nothing to learn")
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
        raise ValueError(f"{field}: role {turn['role']!r} is none of {', '.join(ROLES)}")
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
    if calls and (read := _read_calls(calls, field)):
        message["tool_calls"] = read
    return message


def _join_parts(parts: list, field: str) -> str:
    """Return content that is a list of {"type": "text", "text"} as one text."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else json_type(part)
            raise ValueError(f"{field}: a part of type {kind!r}, where only text can be read")
        texts.append(check_text(part.get("text"), f'{field}: "text" of a part'))
    return "".join(texts)


def _read_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    """Return [{"name", "arguments"}] from a list of calls or one call, or the JSON of either."""
    calls = _parse_json(calls, f'{field}: "tool_calls"')
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f'{field}: a tool call must be an object with "name" and "arguments"')
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # Else it stays a text.
                arguments = json.loads(arguments)
        call = {"name": call["name"], "arguments": {} if arguments is None else arguments}
        check_text(json.dumps(call, ensure_ascii=False), f"{field}: a tool call")
        read.append(call)
    return read


def _parse_json(value: Any, field: str) -> Any:
    """Return a value, parsed if it is JSON in a string."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return []
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field} is a string, but not JSON: {value[:60]!r}") from error


# ---- conversations -------------------------------------------------------------------------------


def read_chat(row: Row, key: str) -> Messages:
    """Convert the messages under `key`, and "tools" and "system" next to them."""
    return require_answer(_read_messages_of(row, key), f'"{key}"')


def _read_messages_of(row: Row, key: str) -> Messages:
    return read_messages(row[key], f'"{key}"', row.get("tools"), row.get("system"))


def read_alpaca(row: Row, join: str) -> Messages:
    """Convert instruction, input, output, system and history; `join` separates the input."""
    answer = row["output"] if "output" in row else row["response"]
    return [*alpaca_prompt(row, join), assistant(check_text(answer, '"output"'))]


def alpaca_prompt(row: Row, join: str) -> Messages:
    """Convert an Alpaca row without its answer."""
    messages = [*_read_system(row), *_read_history(row.get("history"))]
    question = check_text(row["instruction"], '"instruction"')
    more = check_text(row.get("input") or "", '"input"')
    return [*messages, user(question + (join if question and more else "") + more)]


def _read_system(row: Row) -> Messages:
    """Return the system message of a row as a list, empty without one."""
    text = row.get("system")
    return [{"role": "system", "content": check_text(text, '"system"')}] if text else []


def read_question_answer(row: Row) -> Messages:
    """Convert q, a and history."""
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
    """Convert prompt and completion, each a text or a list of messages."""
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
    """Convert chosen and rejected, lists of messages, with the prompt in them or before them."""

    def conversation(key: str) -> Messages:
        answer = read_messages(row[key], f'"{key}"', row.get("tools"))
        if not row.get("prompt") or answer[0]["role"] in ("user", "system"):
            return answer
        return [*_read_prompt(row), *answer]

    return check_pair(conversation("chosen"), conversation("rejected"))


def read_prompt_preference(row: Row) -> tuple[Messages, Messages]:
    """Convert prompt, and chosen and rejected as texts."""
    return _answer_pair(_read_prompt(row), row)


def read_alpaca_preference(row: Row, join: str) -> tuple[Messages, Messages]:
    """Convert instruction, input, and chosen and rejected as texts."""
    return _answer_pair(alpaca_prompt(row, join), row)


def read_sharegpt_preference(row: Row) -> tuple[Messages, Messages]:
    """Convert conversations, and chosen and rejected as single messages that answer them."""
    key = "conversations" if "conversations" in row else "messages"
    return _answer_pair(_read_messages_of(row, key), row)


def _answer_pair(prompt: Messages, row: Row) -> tuple[Messages, Messages]:
    """Return the prompt followed by the chosen, and by the rejected answer."""
    chosen, rejected = ([*prompt, *_read_answer(row, key)] for key in ("chosen", "rejected"))
    return check_pair(chosen, rejected)


def read_text_preference(row: Row) -> tuple[Messages, Messages]:
    """Convert two texts with turns of Human: and Assistant:, or with a common prefix as prompt."""
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
        raise ValueError('"chosen" and "rejected" share no beginning that could be their prompt')
    prompt = user(chosen[:shared].strip())
    return check_pair([prompt, assistant(chosen[shared:])], [prompt, assistant(rejected[shared:])])


def check_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages]:
    """Return the pair; raises ValueError unless the last answer, and nothing else, differs."""
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if require_answer(messages, f'"{key}"')[-1]["role"] != "assistant":
            raise ValueError(f'"{key}" must end with an assistant message')
    if chosen[:-1] != rejected[:-1]:
        raise ValueError('"chosen" and "rejected" have different prompts (all but the last turn)')
    if chosen[-1] == rejected[-1]:
        raise ValueError('"chosen" and "rejected" are the same answer')
    return chosen, rejected
