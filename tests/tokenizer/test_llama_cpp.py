"""Tests that llama.cpp gives the same ids with its pre-tokenizer qwen2, and the same prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.llama_cpp import LlamaCpp
from tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from tokenizer.chat_format import render_prompt
from trainlib.data.conversations import with_tools

SAMPLE = Path(__file__).resolve().parents[2] / "dataset" / "sample"
NUM_TEXTS = 2_500
# What the alternatives of the pre-tokenizer distinguish.
SIGNS = "\n\r\t .!'-。，\u3000\xa0\x85\u2028\u0301\u017f\x00aSél中文1²Ⅷ😀"
PIECES = st.sampled_from([*SIGNS, "\n\n", "\r\n", ".\n", "!\n\n", "LL", *SPECIAL_TOKENS[:9]])
TEXTS = st.text() | st.lists(PIECES).map("".join)


@pytest.fixture(scope="module")
def llama_cpp(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    return LlamaCpp(tokenizer, "qwen2", tmp_path_factory.mktemp("gguf") / "model.gguf")


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_any_text_has_the_ids_of_llama_cpp(tokenizer, llama_cpp, text):
    assert llama_cpp.encode(text) == tokenizer.encode(text)


CALL = {"name": "f", "arguments": {"城": "奥斯陆"}}
CONVERSATIONS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
     {"role": "user", "content": "r"}],
    [{"role": "user", "content": "q"},
     {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [CALL]},
     {"role": "tool", "content": "3"}],
]  # fmt: skip


TOOL = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object"},
}  # llama.cpp adds missing keys


@pytest.mark.parametrize("tools", [[], [TOOL]])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_llama_cpp_renders_the_chat_template_as_the_renderer_does(
    messages, tools, tokenizer, llama_cpp
):
    ours = with_tools(messages, [{"type": "function", "function": tool} for tool in tools])
    expected = tokenizer.show(render_prompt(tokenizer, ours))
    assert llama_cpp.render(messages, tools) == expected


@pytest.mark.parametrize("messages", CONVERSATIONS[:3])
def test_llama_cpp_renders_thinking_off(messages, tokenizer, llama_cpp):
    expected = tokenizer.show(render_prompt(tokenizer, messages, enable_thinking=False))
    assert expected.endswith("<think>\n\n</think>\n\n")
    assert llama_cpp.render(messages, [], enable_thinking=False) == expected


@pytest.mark.slow
def test_sample_texts_have_the_ids_of_llama_cpp(tokenizer, llama_cpp):
    if not SAMPLE.exists():
        pytest.skip("needs the sample: python -m tools.prepare_data")
    texts = sorted({text for path in SAMPLE.rglob("*.jsonl") for text in texts_of(path)})
    texts = texts[:: len(texts) // NUM_TEXTS][:NUM_TEXTS]
    assert len(texts) == NUM_TEXTS
    assert [text for text in texts if llama_cpp.encode(text) != tokenizer.encode(text)] == []


def texts_of(path: Path) -> Iterator[str]:
    """Yield the texts of a sample file: documents, and the turns of conversations."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "text" in row:
            yield row["text"]
        for value in row.values():
            if isinstance(value, list):
                yield from (turn["content"] for turn in value)
