"""Converter for a single message, as others write it; tokenizer/chat_format.py lists its keys."""

import contextlib
import json
import re
from typing import Any

from tokenizer.chat_format import ROLES
from trainlib.data.columns import CALL_ROLES, CONTENT_KEYS, EMPTY_CELLS, parse_literal, role_of
from trainlib.data.containers import GBK_FIX, json_type, load_json, looks_like_gbk

Messages = list[dict[str, Any]]
MARKS = ("weight", "train", "loss")  # Keys of an assistant's turn that say whether it is learned.
THOUGHTS = re.compile(r"\s*(?:<think>)?\n?(.*?)\n?</think>\s*", re.DOTALL)
"""Some chat templates give the opening tag in the prompt, so answers may lack it."""
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
    thoughts = THOUGHTS.match(content)
    if thoughts and "<think>" not in thoughts[1]:
        content = content[thoughts.end() :]
        if thoughts[1].strip():
            message["reasoning_content"] = thoughts[1]
    content, calls = _split_calls(content)
    if calls:
        message["tool_calls"] = calls
    return {**message, "content": content}


def is_false(value: Any) -> bool:
    """Return whether a mark or label is false, as JSON, a number, or a text in CSV."""
    return str(value).strip().lower() in ("false", "0", "0.0")


def add_reasoning(message: dict[str, Any], thoughts: Any, field: str) -> None:
    """Add the reasoning of an answer; raise ValueError if its content begins with another one."""
    if thoughts:
        text = check_text(thoughts, f"{field}: reasoning")
        if message.get("reasoning_content", text).strip() != text.strip():
            raise ValueError(f"{field} has one reasoning in <think> tags and another in a key")
        message["reasoning_content"] = text


def check_text(value: Any, what: str) -> str:
    """Return a string unchanged; raise ValueError for other types and unpaired surrogates."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, not {json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code, reason = ord(value[error.start]), "which no tokenizer can encode"
        if 0xDC80 <= code <= 0xDCFF:  # How surrogateescape decodes an invalid byte.
            reason = f"possibly byte {code - 0xDC00:#04x} in a file that is not UTF-8"
            if looks_like_gbk(value.encode("utf-8", "surrogateescape")):
                reason += f", which {GBK_FIX}"
        raise ValueError(f"{what}: character {error.start} is half of a surrogate pair "
                         f"({value[error.start]!r}), {reason}") from error  # fmt: skip
    return value


def read_turn(turn: Any, field: str) -> Messages:
    """Convert a turn to messages: one, or several for a turn with several tool responses."""
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        raise ValueError(f'{field} must be an object with "role" and "content"')
    role = role_of(turn)
    content = _first(turn, CONTENT_KEYS)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if role in CALL_ROLES:
        role, calls, content = "assistant", content or calls, ""
    if role not in ROLES:
        raise ValueError(f"{field}: role {role!r} is not one of {', '.join(ROLES)}")
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
    add_reasoning(message, thoughts, field)
    if calls and (tool_calls := _read_calls(calls, field)):
        if message.get("tool_calls", tool_calls) != tool_calls:
            raise ValueError(f"{field} has one call in <tool_call> tags and another in a key")
        message["tool_calls"] = tool_calls
    if any(is_false(turn.get(key)) for key in MARKS):
        message["weight"] = 0
    if turn.get("enable_thinking") is False:
        message["enable_thinking"] = False
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
    if parts and all(isinstance(part, str) for part in parts):
        raise ValueError(f"{field} is a list of texts, not one (for pairs: chosen and rejected)")
    for part in parts:
        type_ = part.get("type") if isinstance(part, dict) else json_type(part)
        if type_ != "text":
            raise ValueError(f"{field}: content part of type {type_!r}; only text is supported")
    what = f'{field}: "text" of a content part'
    return "".join(check_text(part.get("text"), what) for part in parts)


def _split_responses(content: str) -> list[str]:
    """Return the texts between <tool_response> tags if the content is nothing else."""
    if "</tool_response>" not in content or RESPONSE.sub("", content.strip()):
        return []
    return [found.strip() for found in RESPONSE.findall(content)]


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
            with contextlib.suppress(ValueError):  # Otherwise it stays a string.
                arguments = load_json(arguments)
        call = {"name": call["name"], "arguments": {} if arguments is None else arguments}
        check_text(json.dumps(call, ensure_ascii=False, default=str), f"{field}: a tool call")
        result.append(call)
    return result


def parse_tools(value: Any, field: str) -> list[dict[str, Any]]:
    """Return the functions in a list, or in its JSON text; an empty list for no functions."""
    functions = (_parse_json(value, field) if value else None) or []
    functions = functions if isinstance(functions, list) else [functions]
    functions = [_parse_json(item, field) for item in functions]
    if not all(isinstance(f, dict) for f in functions):
        raise ValueError(f"{field} must be a list of objects, or a JSON string of such a list")
    if functions:
        check_text(json.dumps(functions, ensure_ascii=False, default=str), field)
    return functions


def _parse_json(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    if value.strip().lower() in EMPTY_CELLS:
        return []
    if (found := parse_literal(value)) is None:
        raise ValueError(f"{field} is a string but not JSON: {value[:60]!r}")
    return found
