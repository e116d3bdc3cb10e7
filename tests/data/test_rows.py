"""Tests that each row is read for what it says, or reported: keys, roles, marks, tags, markers."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainlib.core.errors import UserError
from trainlib.data import formats
from trainlib.data.encode import ENCODERS
from trainlib.data.findings import Counts
from trainlib.data.token_cache import build_cache

USER, YES = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
LONG = "a text of more than three words"


def read(row, kind, **options):
    """Return the values of one row (or the reason why there is none), and the counts."""
    counts = Counts()
    items = [(1, json.dumps(row).encode() if not isinstance(row, bytes) else row)]
    options = formats.ReadOptions(**options)
    [(_, records)] = formats.check_items(items, "file", kind, options, counts)
    if isinstance(records, formats.Broken):
        return records.reason, counts
    return [record.value for record in records], counts


def shown(row, kind="sft", **options):
    """Return a conversation as text, with learned answers in brackets."""
    values, _ = read(row, kind, **options)
    assert isinstance(values, list), values
    return [
        " ".join(
            f"{m['role'][0]}:{m['content']}" if m["role"] != "assistant" or m.get("weight") == 0
            else f"a:[{m['content']}]"
            for m in conversation
        )
        for value in values
        for conversation in (value if isinstance(value, tuple) else (value,))
    ]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), [
    ({"instruction": "i", "context": "c", "response": "r"}, "u:i\nc a:[r]"),
    ({"Instruction": "i", "Input": "", "Output": "r"}, "u:i a:[r]"),
    ({" Question ": "q", "ANSWER": "r"}, "u:q a:[r]"),
    ({"query": "q", "response": "r", "system": "s"}, "s:s u:q a:[r]"),
    ({"system_prompt": "s", "question": "q", "response": "r"}, "s:s u:q a:[r]"),
    ({"prompt": "q", "response": "r"}, "u:q a:[r]"),
    ({"input": "q", "output": "r"}, "u:q a:[r]"),
    ({"instruction": "", "input": "q", "output": "r"}, "u:q a:[r]"),
    ({"q": "2", "a": "r", "history": "[['1', 'x']]"}, "u:1 a:[x] u:2 a:[r]"),
    ({"q": "2", "a": "r", "history": math.nan}, "u:2 a:[r]"),
    ({"q": "2", "a": "r", "history": [USER, YES]}, "u:q a:[a] u:2 a:[r]"),
    ({"conversation": [USER, YES]}, "u:q a:[a]"),
    ({"messages": json.dumps([USER, YES])}, "u:q a:[a]"),
    ({"messages": str([USER, YES])}, "u:q a:[a]"),
    ([{"from": "human", "value": "q"}, {"from": "GPT ", "value": "r"}], "u:q a:[r]"),
    ({"messages": [{"role": " User", "text": "q"}, {"role": "Assistant", "value": "r"}]},
     "u:q a:[r]"),
    ({"prompt": [USER, {**YES, "content": "weak"}, USER], "completion": [YES]},
     "u:q a:weak u:q a:[a]"),
    ({"messages": [USER, {**YES, "weight": 0}, USER, YES]}, "u:q a:a u:q a:[a]"),
    ({"messages": [USER, {**YES, "train": False}, USER, YES]}, "u:q a:a u:q a:[a]"),
    ({"messages": [USER, {**YES, "loss": False}, USER, {**YES, "loss": True}]},
     "u:q a:a u:q a:[a]"),
    ({"messages": [USER, {**YES, "content": " "}, USER, YES]}, "u:q a:  u:q a:[a]"),
    ({"prompt": "q", "completion": "r", "label": True}, "u:q a:[r]"),
])  # fmt: skip
def test_conversations_are_read_under_the_names_that_others_use(row, expected):
    assert shown(row) == [expected]


@pytest.mark.parametrize(("row", "expected"), [
    ({"question": "q", "chosen": "y", "rejected": "n"}, ["u:q a:[y]", "u:q a:[n]"]),
    ({"input": "q", "chosen": "y", "rejected": "n"}, ["u:q a:[y]", "u:q a:[n]"]),
    ({"messages": [USER, YES], "prompt": "p", "chosen": "y", "rejected": "n"},
     ["u:p a:[y]", "u:p a:[n]"]),
    ({"conversations": [{"from": "human", "value": "q"}], "chosen": "y", "rejected": "n"},
     ["u:q a:[y]", "u:q a:[n]"]),
    ({"chosen": json.dumps([USER, YES]), "rejected": json.dumps([USER, {**YES, "content": "n"}])},
     ["u:q a:[a]", "u:q a:[n]"]),
    # They diverge before the last turn: all later answers are learned, and no user turn.
    ({"chosen": [USER, YES, USER, YES],
      "rejected": [USER, {**YES, "content": "n"}, {**USER, "content": "r"}, YES]},
     ["u:q a:[a] u:q a:[a]", "u:q a:[n] u:r a:[a]"]),
    # An answer in the common beginning is part of the prompt.
    ({"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, {**YES, "content": "n"}]},
     ["u:q a:a u:q a:[a]", "u:q a:a u:q a:[n]"]),
    ({"chosen": [USER, YES], "rejected": [USER, YES, USER, {**YES, "content": "n"}]},
     ["u:q a:[a]", "u:q a:[a] u:q a:[n]"]),
])  # fmt: skip
def test_pairs_are_read_under_the_names_that_others_use(row, expected):
    assert shown(row, "dpo") == expected


@pytest.mark.parametrize(("row", "kind", "reason"), [
    ({"messages": [USER, YES], "label": False}, "sft", "label"),
    ({"prompt": "q", "completion": "r", "label": "False"}, "sft", "label"),
    ({"messages": [USER, YES], "kto_tag": False}, "sft", "label"),
    ({"messages": [USER, {**YES, "content": ""}]}, "sft", "every answer is empty"),
    ({"messages": [USER, {**YES, "weight": 0}]}, "sft", "not to be learned"),
    ({"prompt": "q", "chosen": "", "rejected": "n"}, "dpo", "an answer of the pair is empty"),
    ({"prompt": "q", "completion": None}, "sft", '"completion" is empty'),
    ({"text": " \n"}, "pretrain", '"text" is empty'),
    ({"conversations": [USER]}, "sft", "no assistant message"),
    ({"conversations": []}, "sft", '"conversations" is empty'),
    ({"instruction": "", "input": "<noinput>", "output": "r"}, "sft", '"instruction" is empty'),
    ({"chosen": [USER, YES], "rejected": [USER, YES]}, "dpo", "the same answer"),
    ({"prompt": "", "chosen": "y", "rejected": "n"}, "dpo", '"prompt" is empty'),
    ({"prompt": "q", "completion": "r", "label": 0}, "sft", "label"),
    ({"messages": [USER, YES], "rejected_response": "n"}, "sft", "dpo data"),
    ({"text": "t"}, "sft", "pretrain data, not sft data"),
    ({"messages": [USER, YES]}, "dpo", "sft data, not dpo data"),
])  # fmt: skip
def test_rows_that_a_stage_does_not_use_are_counted_and_not_broken(row, kind, reason):
    values, counts = read(row, kind)
    [(found, count)] = counts.not_used.items()
    assert values == [] and reason in found and count == counts.rows == 1


def test_a_text_pair_is_refused_if_another_column_could_be_the_prompt():
    row = {"my_question": "q", "chosen": "It is good.", "rejected": "It is bad."}
    reason, _ = read(row, "dpo")
    assert "data.columns=[prompt:my_question]" in reason
    columns = ("prompt:my_question",)
    assert shown(row, "dpo", columns=columns) == ["u:q a:[It is good.]", "u:q a:[It is bad.]"]
    del row["my_question"]
    assert shown(row, "dpo") == ["u:It is a:[good.]", "u:It is a:[bad.]"]


def test_an_unknown_shape_is_refused_with_its_columns_filled_in():
    reason, _ = read({"id": "1", "instruct": "q", "reply": "r"}, "sft")
    assert (
        '"data.columns=[prompt:instruct,answer:reply]"' in reason and "chosen, rejected" in reason
    )
    assert "data.columns" not in read({"question": "q", "context": "c", "answers": {}}, "sft")[0]
    choices = {"question": "q", "A": "one", "B": "two", "Answer": "B"}
    assert shown(choices) == ["u:q a:[B]"]
    assert isinstance(read({"question": "q", "A": "one", "B": "two"}, "sft")[0], str)
    assert '"data.columns=[text:body]"' in read({"body": "t"}, "pretrain")[0]
    columns = ("prompt:instruct", "answer:reply")
    assert shown({"instruct": "q", "reply": "r"}, columns=columns) == ["u:q a:[r]"]


def test_tags_in_content_become_reasoning_calls_and_tool_turns():
    results = "<tool_response>1</tool_response><tool_response>2</tool_response>"
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": f"<think>\nwhy\n</think>\nWait.\n{call}\n{call}"},
        {"from": "tool", "value": results},
        {"from": "gpt", "value": f"{call} is a text here"},
    ]  # fmt: skip
    [[user, first, one, two, last]] = read(turns, "sft")[0]
    calls = [{"name": "f", "arguments": {"x": 1}}] * 2
    assert first == {"role": "assistant", "content": "Wait.", "reasoning_content": "why",
                     "tool_calls": calls}  # fmt: skip
    assert [one["content"], two["content"]] == ["1", "2"] and one["role"] == two["role"] == "tool"
    assert "tool_calls" not in last and last["content"].endswith("is a text here")


def test_the_older_function_format_and_other_names_for_reasoning_are_read():
    row = {
        "functions": [{"name": "f", "parameters": {}}],
        "messages": [
            USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "1"},
            {"role": "assistant", "content": "a", "thinking": "t"},
        ],
    }  # fmt: skip
    [[system, _, call, tool, last]] = read(row, "sft")[0]
    assert system["tools"] == row["functions"] and tool["role"] == "tool"
    assert call["tool_calls"] == [{"name": "f", "arguments": {}}]
    assert last["reasoning_content"] == "t"


@pytest.mark.parametrize(("value", "kept"), [(False, True), (0, False), ("false", False),
                                             (None, False), (True, False)])  # fmt: skip
def test_enable_thinking_is_kept_if_it_is_exactly_false(value, kept):
    answer = {"role": "assistant", "content": "<think>\n\n</think>\n\na", "enable_thinking": value}
    [[user, read_answer]], counts = read(
        {"messages": [{**USER, "enable_thinking": value}, answer]}, "sft"
    )
    assert user == USER and not counts.unused_keys
    expected = {"role": "assistant", "content": "a"}
    assert read_answer == ({**expected, "enable_thinking": False} if kept else expected)


@pytest.mark.parametrize(("text", "documents"), [
    ("<|im_start|>one<|im_end|> <|im_start|>two<|im_end|>", ["one", "two"]),
    ("one<|im_end|>two<|im_end|>", ["one", "two"]),
    ("<s>one</s><s>two</s>", ["one", "two"]),
    ("<|im_start|>one", ["one"]),
    ("one</s>", ["one"]),
    ("one<|endoftext|>two", ["one", "two"]),
    ("one <|im_end|> is a marker", ["one <|im_end|> is a marker"]),
    ("a < b", ["a < b"]),
])  # fmt: skip
def test_markers_separate_the_documents_of_a_pretraining_row(text, documents):
    values, counts = read({"text": text}, "pretrain")
    assert values == documents
    split = len(documents) > 1
    assert (counts.split_rows, counts.documents) == (int(split), len(documents) * split)
    assert counts.special_text == ("is a marker" in text)
    assert read({"text": text}, "pretrain", split_markers=False)[0] == [text]


def test_keys_that_nothing_reads_are_counted_and_texts_under_them_are_findings():
    rows = [{"instruction": "i", "output": "o", "id": i, "Category": LONG, "note": "x",
             "rationale": LONG if i % 5 == 0 else "no", "copy": "i o"}
            for i in range(20)]  # fmt: skip
    counts = Counts()
    items = [(i, json.dumps(row).encode()) for i, row in enumerate(rows, 1)]
    list(formats.check_items(items, "file", "sft", formats.ReadOptions(), counts))
    assert counts.unused_keys == {"note": 20, "rationale": 20, "copy": 20}
    [finding] = counts.findings()
    assert finding["name"] == '"rationale" is not read' and finding["lines"] == [1, 6, 11, 16]
    assert (finding["count"], finding["share"]) == (4, 0.2) and "data.columns" in finding["fix"]
    turns = [USER, {**YES, "comment": "这是一条没有人读的说明文字"}]
    assert list(read({"messages": turns}, "sft")[1].unused_texts) == ["messages[].comment"]
    # A column that repeats what is read, such as Alpaca's rendered "text", is no finding.
    row = {"instruction": LONG, "output": "the answer", "text": f"### {LONG}\nthe answer"}
    assert not read(row, "sft")[1].unused_texts


def test_the_order_of_rows_in_a_mixed_file_changes_nothing():
    rows = [
        {"chosen": "\n\nHuman: a\n\nAssistant: y", "rejected": "\n\nHuman: a\n\nAssistant: n"},
        {"prompt": "q", "chosen": "It is y.", "rejected": "It is n."},
        {"conversations": [USER], "chosen": YES, "rejected": {**YES, "content": "n"}},
        {"prompt": "q", "chosen": [YES], "rejected": [{**YES, "content": "n"}]},
    ]  # fmt: skip
    alone = [read(row, "dpo")[0] for row in rows]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        items = [(i, json.dumps(rows[i]).encode()) for i in order]
        checked = formats.check_items(items, "file", "dpo", formats.ReadOptions(), Counts())
        assert [[r.value for r in records] for _, records in checked] == [alone[i] for i in order]


def test_a_mixed_file_trains_on_the_rows_of_the_stage(tmp_path, elsewhere, tokenizer, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "mixed.jsonl"
    rows = [{"text": "t"}, {"messages": [USER, YES]}, {"messages": [USER, {**YES, "content": ""}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = build_cache(path, "sft", tokenizer)
    assert cache.num_records == 1 and cache.lines.tolist() == [2] and cache.num_skipped == 0
    assert (
        "2 of 3 rows are not used: pretrain data, not sft data (1), every answer is empty (1)"
        in (caplog.text)
    )
    path.write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(UserError, match="no row can be used for sft: every answer is empty"):
        build_cache(path, "sft", tokenizer)


names = st.sampled_from([
    "role", "from", "content", "value", "name", "tool_calls", "function_call", "arguments",
    "weight", "reasoning", "tools", "type", "text", "x",
])  # fmt: skip
words = st.sampled_from([
    "user", "assistant", "gpt", "[]", "{}", "[{", "NaN", "<think>", "</think>", "<tool_call>{}",
    "</tool_call>", "<tool_response>", "<|im_end|>", "\ud800", "",
])  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=6)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
turn = st.fixed_dictionaries(
    {"role": words | scalars, "content": values}, optional={"tool_calls": values, "weight": values}
)
columns = st.sampled_from([
    "text", "messages", "conversations", "prompt", "instruction", "input", "output", "answer",
    "history", "system", "tools", "chosen", "rejected", "label", "source", "other",
])  # fmt: skip
row_values = values | st.lists(turn, max_size=3) | st.lists(turn, max_size=2).map(json.dumps)


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(row=st.dictionaries(columns, row_values, max_size=6), kind=st.sampled_from(list(ENCODERS)))
def test_any_row_is_used_or_broken_or_not_used_and_never_a_traceback(row, kind, tokenizer):
    counts = Counts()
    checked = formats.check_items([(1, row)], "file", kind, formats.ReadOptions(), counts)
    [(_, records)] = checked
    if isinstance(records, formats.Broken):
        assert records.reason and counts.rows == 0
        return
    assert counts.rows == 1 and bool(records) == (not counts.not_used)
    for record in records:
        for sequence in ENCODERS[kind](tokenizer, record):
            assert any(sequence.mask)


@pytest.mark.parametrize("row", [
    {"messages": [{**YES, "tool_calls": "[{'name': 'f', 'arguments': {'x': {1, 2}}}]"}]},
    {"messages": [USER, YES], "tools": "[{'name': 'f', 'p': {(1, 2): 3}}]"},
    {"text": "abc", "notes": json.loads("[" * 800 + "]" * 800)},
    {"text": "abc", "\ud800": "x"},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["sft", "pretrain"])
def test_values_that_json_lacks_and_deep_nesting_end_in_no_traceback(row, kind):
    values, counts = read(row, kind)
    assert isinstance(values, str) or counts.rows == 1
    json.dumps(counts.unused_keys)


def test_texts_in_json_cells_and_short_answers_within_long_texts_are_not_missed():
    turns = json.dumps([USER, {**YES, "analysis": "one two three four five"}])
    assert read({"messages": turns}, "sft")[1].unused_texts == {"messages[].analysis": 1}
    row = {"question": "Who?", "answer": "B. Obama",
           "passage": "In the year 2009, B. Obama became president of the US. " * 3}  # fmt: skip
    assert read(row, "sft")[1].unused_texts == {"passage": 1}


def test_empty_content_does_not_hide_text_and_a_system_message_stays():
    turns = [USER, {"role": "assistant", "content": "", "text": "the answer"}]
    assert shown({"messages": turns}) == ["u:q a:[the answer]"]
    system = {"role": "system", "content": "s"}
    pair = {"prompt": [system, USER], "chosen": [USER, YES],
            "rejected": [USER, {**YES, "content": "n"}]}  # fmt: skip
    assert shown(pair, "dpo") == ["s:s u:q a:[a]", "s:s u:q a:[n]"]
    values, counts = read({"conversations": [USER], "chosen": YES, "rejected": YES}, "sft")
    assert values == [] and list(counts.not_used) == ["dpo data, not sft data"]


@pytest.mark.parametrize(("row", "expected"), [
    ({"Text": None, "instruction": None, "input": "q", "output": "r"}, "u:q a:[r]"),
    ({"Question": "q", "Complex_CoT": "why", "Response": "r"}, "u:q a:[r]"),
    ({"conversations": {"from": ["human", "gpt"], "value": ["q", "r"]}}, "u:q a:[r]"),
    ({"messages": "[{'role': 'user', 'content': 'q'}\n {'role': 'bot', 'content': 'r'}]"},
     "u:q a:[r]"),
    ([{"role": "用户", "content": "q"}, {"role": "助手", "content": "r"}], "u:q a:[r]"),
    ({"prompt": "\n\nHuman: q\n\nAssistant: x\n\nHuman: p\n\nAssistant:", "response": " r"},
     "u:q a:x u:p a:[ r]"),
])  # fmt: skip
def test_shapes_of_other_programs_are_read(row, expected):
    assert shown(row) == [expected]


def test_a_null_column_does_not_hide_a_column_of_the_same_name():
    assert read({"Text": None, "text": "t"}, "pretrain")[0] == ["t"]


def test_reasoning_of_a_flat_row_is_learned_and_never_given_twice():
    row = {"question": "q", "reasoning": "why", "answer": "r"}
    [[_, answer]] = read(row, "sft")[0]
    assert answer == {"role": "assistant", "content": "r", "reasoning_content": "why"}
    row = {"question": "q", "steps": "why", "answer": "r"}
    [[_, mapped]] = read(row, "sft", columns=("reasoning:steps",))[0]
    assert mapped == answer
    turn = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nr"}
    [[_, same]] = read({"messages": [USER, {**turn, "thinking": "why "}]}, "sft")[0]
    assert same == {**answer, "reasoning_content": "why "}
    reason, _ = read({"messages": [USER, {**turn, "thinking": "because"}]}, "sft")
    assert "one reasoning in <think> tags and another in a key" in reason


def test_what_lies_beside_the_part_of_a_row_that_is_read_is_reported():
    system = {"role": "system", "content": "be kind"}
    for row, kind, key in (
        ({"prompt": [USER], "input": LONG, "completion": "r"}, "sft", "input"),
        ({"prompt": [USER], "history": [["1", LONG]], "completion": "r"}, "sft", "history"),
        ({"messages": [system, USER, YES], "system": LONG}, "sft", "system"),
        ({"messages": [USER, YES], "prompt": LONG}, "sft", "prompt"),
        ({"question": "q", "A": "1", "B": "2", "answer": "A"}, "sft", "B"),
        ({"question": "q", "choices": ["1", "2"], "answer": "1"}, "sft", "choices"),
    ):
        assert key in read(row, kind)[1].unused_texts, row
    # The same texts are read where nothing else says them.
    assert shown({"messages": [USER, YES], "system": LONG}) == [f"s:{LONG} u:q a:[a]"]


def test_tools_of_later_turns_are_read_and_tools_in_the_text_are_not_repeated():
    tools = [{"name": "f"}]
    [[system, *_]] = read({"messages": [USER, {**YES, "tools": tools}]}, "sft")[0]
    assert system["tools"] == tools
    other = {**YES, "functions": [{"name": "g"}]}
    assert (
        "different tools in two places"
        in read({"messages": [{**USER, "tools": tools}, other]}, "sft")[0]
    )
    listed = {"role": "system", "content": 'Use <tools>{"name": "f"}</tools>.'}
    [[system, *_]] = read({"messages": [listed, USER, YES], "tools": tools}, "sft")[0]
    assert system == listed


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), [
    ("q", [USER, YES], [USER, {**YES, "content": "n"}]),
    ([USER], [USER, YES], [USER, {**YES, "content": "n"}]),
    ("\n\nHuman: q\n\nAssistant:", "a", "n"),
])  # fmt: skip
def test_a_prompt_that_the_answers_repeat_is_given_once(prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert shown(row, "dpo") == ["u:q a:[a]", "u:q a:[n]"]


def test_a_prompt_that_is_not_part_of_whole_conversations_is_refused():
    row = {"prompt": "another", "chosen": [USER, YES],
           "rejected": [USER, {**YES, "content": "n"}]}  # fmt: skip
    assert "does not contain the prompt" in read(row, "dpo")[0]


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("text,text\na,b\n")
    [item] = formats.Source(path).items()
    assert "two columns are named 'text'" in item.content.reason
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], ["text", "text"])
    parquet.write_table(table, tmp_path / "twice.parquet")
    [item] = formats.Source(tmp_path / "twice.parquet").items()
    assert "two columns are named 'text'" in item.content.reason


def test_an_answer_keeps_its_start_unless_it_repeats_a_long_prompt():
    for prompt, chosen, rejected in (
        ("你好", "你好！我在。", "你好，再见"),
        ("1", "1 is", "1 was"),
    ):
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        assert shown(row, "dpo") == [f"u:{prompt} a:[{chosen}]", f"u:{prompt} a:[{rejected}]"]
    prompt = "Who wrote the Analects, and when?"
    row = {"prompt": prompt, "chosen": prompt + "\na", "rejected": prompt + "\nn"}
    assert shown(row, "dpo") == [f"u:{prompt} a:[a]", f"u:{prompt} a:[n]"]
    assert shown({**row, "rejected": "n"}, "dpo")[0] == f"u:{prompt} a:[{row['chosen']}]"


def test_data_that_looks_like_a_message_stays_the_text_of_an_answer():
    for answer in ('{"from": "Paris", "to": "Rome"}', json.dumps([USER, YES]), '["a", "b"]'):
        assert shown({"instruction": "i", "output": answer}) == [f"u:i a:[{answer}]"]
        assert shown({"instruction": answer, "output": "o"}) == [f"u:{answer} a:[o]"]
    trip = '{"from": "Paris", "to": "Rome"}'
    assert shown({"prompt": "p", "completion": trip}) == [f"u:p a:[{trip}]"]
    assert shown({"prompt": "p", "chosen": trip, "rejected": "n"}, "dpo")[0] == f"u:p a:[{trip}]"


@pytest.mark.parametrize(("row", "expected"), [
    ({"instruction": "Human:q\nAssistant:x\nHuman:p\nAssistant:", "output": "r"},
     "u:q a:x u:p a:[r]"),
    ({"conversation": [{"input": "q", "output": "r"}, {"output": "s", "input": "p"}]},
     "u:q a:[r] u:p a:[s]"),
    ({"conversation": [{"assistant": "r", "human": "q"}]}, "u:q a:[r]"),
    ({"conversations": ["q", "r", "p", "s"]}, "u:q a:[r] u:p a:[s]"),
    ({"question": "2+2", "answer": 4}, "u:2+2 a:[4]"),
    ({"instruction": "i", "input": "<noinput>", "output": "r"}, "u:i a:[r]"),
    ({"question": "q", "answer": "r", "label": 0}, "u:q a:[r]"),
    ({"question": "q", "answer": "r", "reasoning": "off"}, "u:q a:[r]"),
    ({"prompt": [USER], "completion": [USER, YES]}, "u:q a:[a]"),
    ({"prompt": [USER, {**YES, "content": "x"}, USER],
      "completion": [USER, {**YES, "content": "x"}, USER, YES]}, "u:q a:x u:q a:[a]"),
])  # fmt: skip
def test_further_shapes_of_conversations(row, expected):
    assert shown(row) == [expected]


def test_reasoning_may_lack_its_opening_tag_as_chat_templates_write_it():
    [[_, answer]] = read({"prompt": "q", "completion": "why\n</think>\n\nr"}, "sft")[0]
    assert answer == {"role": "assistant", "content": "r", "reasoning_content": "why"}


def test_a_rejected_response_beside_messages_makes_a_pair():
    row = {"messages": [USER, YES], "rejected_response": "n"}
    assert shown(row, "dpo") == ["u:q a:[a]", "u:q a:[n]"]


def test_what_a_message_holds_beside_its_content_is_reported():
    for turn in ({**USER, "text": LONG}, {**USER, "reasoning": LONG}):
        assert read({"messages": [turn, YES]}, "sft")[1].unused_texts, turn
    turns = [{**YES, "analysis": LONG}]
    assert read({"prompt": [USER], "completion": turns}, "sft")[1].unused_texts
    assert not read({"messages": [{**USER, "text": "q"}, YES]}, "sft")[1].unused_texts


def test_tools_of_an_answer_come_before_the_conversation():
    tools = [{"name": "f"}]
    [[system, user, answer]] = read(
        {"prompt": [USER], "completion": [{**YES, "tools": tools}]}, "sft"
    )[0]
    assert (system["tools"], user["role"], answer["role"]) == (tools, "user", "assistant")
    text = {"messages": [{**USER, "content": "explain <tools>"}, YES], "tools": tools}
    assert read(text, "sft")[0][0][0]["tools"] == tools
    both = [{"role": "system", "content": "", "tools": [{"name": "g"}]}, USER, YES]
    assert "in two places" in read({"messages": both, "tools": tools}, "sft")[0]
    call = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    turn = {"role": "assistant", "content": call, "tool_calls": [{"name": "f", "arguments": {}}]}
    assert "one call in <tool_call> tags" in read({"messages": [USER, turn]}, "sft")[0]


@pytest.mark.parametrize("text", [
    "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
    "<s>[INST] q [/INST] a</s><s>[INST] p [/INST] b</s>",
    "one <s>struck</s> word",
])  # fmt: skip
def test_chats_and_html_in_pretraining_rows_stay_whole(text):
    values, counts = read({"text": text}, "pretrain")
    assert values == [text] and counts.special_text == ("<|" in text)


def test_hints_name_columns_with_text_and_never_guess_which_answer_is_better():
    row = {"message_id": "x", "problem": "How much is it?", "solution": "Two.", "source": "web"}
    assert "data.columns=[prompt:problem,answer:solution]" in read(row, "sft")[0]
    pair = {"prompt": "q", "response_0": "a", "response_1": "b", "note": "c", "better": 1}
    assert "chosen:..." in read(pair, "dpo")[0]
    assert "data.columns=[messages:data]" in read({"data": ["q", "a"]}, "sft")[0]


def test_a_gbk_header_is_named_as_such(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("问题,回答\n你好,再见\n".encode("gbk"))
    with pytest.raises(UserError, match="GBK"):
        formats.detect(path, "sft")
    path.write_text("q,a,,\n1,2,,\n")
    assert [item.content for item in formats.Source(path).items()] == [{"q": "1", "a": "2"}]


def test_a_list_as_numpy_prints_it_takes_no_quadratic_time():
    assert read({"messages": "[{}" + "\n" * 200_000 + "x]"}, "sft")[0].count("list of messages")
