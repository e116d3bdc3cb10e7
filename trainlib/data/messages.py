"""Converter for a single message: roles, reasoning, tool calls and marks, as others write them.

A message is {"role", "content"}, optionally with "reasoning_content" and "tool_calls" (assistant),
"tools" (leading system message), or "weight": 0 (assistant: not learned).
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from tokenizer.chat_format import ROLES
from trainlib.data.columns import parse_literal
from trainlib.data.containers import GBK_FIX, json_type, looks_like_gbk

Messages = list[dict[str, Any]]
ROLE_ALIASES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "observation": "tool",
    "function": "tool", "function_response": "tool", "ipython": "tool", "developer": "system",
}  # fmt: skip
"""Other names for roles, in lower case. A function_call is an assistant turn with only a call."""
MARKS = ("weight", "train", "loss")
"""Keys of an assistant's turn that say whether it is learned."""
THOUGHTS = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>\s*", re.DOTALL)
CALL, CALL_END = "<tool_call>", "</tool_call>"


def user(content: str) -> dict[str, Any]:
    """Return a user message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    """Return an assistant message, with reasoning and calls taken from the tags in its content."""
    message: dict[str, Any] = {"role": "assistant"}
    if "<" not in content:
        return {**message, "content": content}
    if thoughts := THOUGHTS.match(content):
        content = content[thoughts.end() :]
        if thoughts[1].strip():
            message["reasoning_content"] = thoughts[1]
    content, calls = _split_calls(content)
    if calls:
        message["tool_calls"] = calls
    return {**message, "content": content}


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


def read_turn(turn: Any, field: str) -> Messages:
    """Convert a turn to messages: one, or several for a turn with several tool responses."""
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        raise ValueError(f'{field} must be an object with "role" and "content"')
    spelled = turn.get("from") if turn.get("role") is None else turn["role"]
    role = spelled.strip().lower() if isinstance(spelled, str) else spelled
    content = _first(turn, ("content", "value", "text"))
    calls = turn.get("tool_calls") or turn.get("function_call")
    if role == "function_call":
        role, calls, content = "assistant", content, ""
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"{field}: role {spelled!r} is not one of {', '.join(ROLES)}")
    thoughts = _first(turn, ("reasoning_content", "reasoning", "thinking"))
    if content is None and (calls or thoughts):
        content = ""
    if isinstance(content, list):
        content = _join_parts(content, field)
    content = check_text(content, f'{field}: "content"')
    if role in ("tool", "user") and (responses := _split_responses(content)):
        return [{"role": "tool", "content": text} for text in responses]
    if role != "assistant":
        return [{"role": role, "content": content}]
    message = assistant(content)
    if thoughts:
        message["reasoning_content"] = check_text(thoughts, f"{field}: reasoning")
    if calls and (tool_calls := _read_calls(calls, field)):
        message["tool_calls"] = tool_calls
    if turn.get("enable_thinking") is False:
        message["enable_thinking"] = False
    for key in MARKS:
        if key in turn and turn[key] in (False, "false", "False", "0"):  # Also the number 0.
            message["weight"] = 0
    return [message]


def _first(turn: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """Return the first value that is neither null nor empty, else an empty one, or None."""
    empty = None
    for key in keys:
        if value := turn.get(key):
            return value
        empty = value if empty is None else empty
    return empty


def _join_parts(parts: list, field: str) -> str:
    """Join content that is given as a list of {"type": "text", "text": ...} parts."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            type_ = part.get("type") if isinstance(part, dict) else json_type(part)
            raise ValueError(f"{field}: content part of type {type_!r}; only text is supported")
        texts.append(check_text(part.get("text"), f'{field}: "text" of a content part'))
    return "".join(texts)


def _split_responses(content: str) -> list[str]:
    """Return the texts between <tool_response> tags if the content is nothing else."""
    if "</tool_response>" not in content:
        return []
    text = content.strip()
    if not (text.startswith("<tool_response>") and text.endswith("</tool_response>")):
        return []
    return [] if RESPONSE.sub("", text) else [found.strip() for found in RESPONSE.findall(text)]


def _split_calls(content: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the content before its final <tool_call> blocks, and the calls in them."""
    rest, calls = content.rstrip(), []
    while rest.endswith(CALL_END) and CALL in rest:
        begin = rest.rindex(CALL)
        call = parse_literal(rest[begin + len(CALL) : -len(CALL_END)])
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            break  # It stays a text.
        calls = [*_read_calls(call, "a tool call"), *calls]
        rest = rest[:begin].rstrip()
    return (rest, calls) if calls else (content, [])


def _read_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    """Convert one call or a list of calls, parsed or a JSON string, to [{"name", "arguments"}]."""
    calls = _parse_json(calls, f'{field}: "tool_calls"')
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f'{field}: a tool call must be an object with "name" and "arguments"')
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # Otherwise it stays a string.
                arguments = json.loads(arguments)
        call = {"name": call["name"], "arguments": {} if arguments is None else arguments}
        check_text(json.dumps(call, ensure_ascii=False, default=str), f"{field}: a tool call")
        result.append(call)
    return result


def parse_tools(value: Any, field: str) -> list[dict[str, Any]]:
    """Return the functions in a list, or in its JSON text; an empty list for no functions."""
    functions = _parse_json(value, field) if value else []
    functions = [functions] if isinstance(functions, dict) and functions else functions or []
    if not isinstance(functions, list) or not all(isinstance(f, dict) for f in functions):
        raise ValueError(f"{field} must be a list of objects, or a JSON string of such a list")
    if functions:
        check_text(json.dumps(functions, ensure_ascii=False, default=str), field)
    return functions


def _parse_json(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    if value.strip().lower() in ("", "nan", "none", "null"):
        return []
    if (found := parse_literal(value)) is None:
        raise ValueError(f"{field} is a string but not JSON: {value[:60]!r}")
    return found
