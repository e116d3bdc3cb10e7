"""Tests that splitting loses no text, and that models can learn from the preference pairs.

The answers in a pair differ only in the way that defines its type, not in cues such as length.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tools.prepare_data.rows import (
    PAIR_BYTES,
    Row,
    behaviour_pairs,
    continuation_pairs,
    conversation,
    cut_short,
    fill_in,
    identity_rows,
    is_validation,
    law_documents,
    play_documents,
    ranked_pairs,
    repeat_passage,
    split_halves,
    statute_conversations,
)
from tools.prepare_data.sources import Article

LAW = "虚构的法"
ANSWER = "水在零度结冰，在一百度沸腾。这取决于气压。高山上的沸点更低。"
ENGLISH = "Water freezes at zero degrees. It boils at one hundred. On mountains it boils earlier."


def test_the_validation_split_does_not_change() -> None:
    """Published figures and existing validation files depend on which groups are held out."""
    assert is_validation("三国演义 003") and not is_validation("三国演义 001")
    assert is_validation("comedy_of_errors") and is_validation("henry_v")
    assert not is_validation("hamlet")
    assert is_validation("中华人民共和国个人信息保护法")


def test_law_documents_keep_every_article_under_the_name_of_the_law() -> None:
    articles = [
        Article(law, f"第{chapter}章", f"第{n}条", f"{law}{chapter}{n}" + "文" * 200)
        for law in ("甲法", "乙法")
        for chapter in "一二"
        for n in range(12)
    ]
    documents = list(law_documents(articles))
    assert len(documents) > 4, "long chapters must be split"
    for law, text in documents:
        assert text.startswith(law + "\n第") and len(text.encode()) < 6_000
    joined = "\n".join(text for _, text in documents)
    assert all(f"{a.number} {a.text}" in joined for a in articles)


def test_joining_play_documents_restores_the_play() -> None:
    speech = "WHO.\n" + "words " * 40
    text = "\n\n".join(["TITLE", "ACT I.", "Scene I.", *[speech] * 60, "Scene II.", *[speech] * 9])
    pieces = list(play_documents(text))
    assert "\n\n".join(pieces) == text
    assert pieces[-1].startswith("Scene II.") and max(map(len, pieces)) < 9_000


@pytest.mark.parametrize("text", [ANSWER, ENGLISH])
def test_a_truncated_answer_ends_mid_sentence(text: str) -> None:
    cut = cut_short(text)
    assert cut and text.startswith(cut) and 0.4 <= len(cut) / len(text) <= 0.8
    assert cut[-1].isalnum() and (text[len(cut)].isalnum() or text[len(cut)] == " ")


@pytest.mark.parametrize("text", [ANSWER, ENGLISH])
def test_a_repeated_passage_occurs_three_times(text: str) -> None:
    repeated = repeat_passage(text)
    assert repeated and len(repeated) > len(text)
    added = len(repeated) - len(text)
    starts = [i for i in range(len(text)) if repeated[:i] + repeated[i + added :] == text]
    passages = {repeated[i : i + added // 2].strip() for i in starts} & {
        text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)
    }
    assert any(repeated.count(passage) == 2 + text.count(passage) for passage in passages)


def test_short_answers_are_not_corrupted() -> None:
    assert cut_short("五") is None and repeat_passage("Five") is None


def test_a_text_is_split_at_a_punctuation_mark_near_the_middle() -> None:
    text = "任何单位应当在十日内提出申请，并附上证明文件，由主管部门作出决定。"
    halves = split_halves(text)
    assert halves and "".join(halves) == text
    assert halves[0][-1] in "，；。：" and 0.3 <= len(halves[0]) / len(text) <= 0.7
    assert split_halves("一，" + "字" * 30) is None and split_halves("没有标点") is None


def some_conversations(count: int) -> list[Row]:
    return [
        conversation(
            f"问题{n}？", "alpaca_zh", f"问题{n}？", f"第{n}个回答，{'很' * (n % 9)}好。" + ANSWER
        )
        for n in range(count)
    ]


def test_behaviour_pairs_are_balanced_by_type_and_by_length() -> None:
    rows = some_conversations(600)
    training = [row for row in rows if not is_validation(row.group)]
    types: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    answers = {row.content["messages"][1]["content"] for row in training}
    for pair in behaviour_pairs(training):
        chosen, rejected = (pair.content[side][-1]["content"] for side in ("chosen", "rejected"))
        assert pair.content["chosen"][:-1] == pair.content["rejected"][:-1]
        assert chosen != rejected and chosen in answers
        name = "other" if rejected in answers else "cut" if chosen.startswith(rejected) else "loop"
        types[name] += 1
        lengths[(len(rejected) > len(chosen)) - (len(rejected) < len(chosen))] += 1
        question = pair.content["chosen"][0]["content"]
        assert len((question + max(chosen, rejected, key=len)).encode()) <= PAIR_BYTES + 100
    assert sum(types.values()) == len(training)
    assert max(types.values()) - min(types.values()) <= 1
    assert abs(lengths[1] - lengths[-1]) < 0.2 * len(training)


def test_held_out_conversations_yield_a_pair_of_each_type() -> None:
    held_out = [row for row in some_conversations(600) if is_validation(row.group)]
    assert len(list(behaviour_pairs(held_out))) == 3 * len(held_out) > 0


def law_of(count: int) -> list[Article]:
    return [
        Article(
            LAW, "", f"第{n}条",
            f"第{n}类经营者应当依照规定向主管部门办理登记，提交第{n}类全部证明文件，"
            f"主管部门应当自收到之日起{n}日内审查完毕，并且将决定书面通知第{n}类申请人。",
        )
        for n in range(count)
    ]  # fmt: skip


def test_continuation_pairs_choose_the_second_half_of_the_same_article() -> None:
    articles = law_of(60)
    pairs = list(continuation_pairs(articles))
    assert len(pairs) >= 5
    for pair in pairs:
        question = pair.content["chosen"][0]["content"]
        chosen, rejected = (pair.content[side][1]["content"] for side in ("chosen", "rejected"))
        number, first = question.removeprefix(f"请续写《{LAW}》").split("：\n")
        [same] = [article for article in articles if article.number == number]
        assert same.text == first + chosen and pair.group == LAW
        [other] = [article for article in articles if article.text.endswith(rejected)]
        assert other != same and 0.75 <= len(rejected) / len(chosen) <= 1.33


def test_a_second_half_that_is_also_correct_is_not_rejected() -> None:
    one = law_of(40)
    # Articles with the same first halves but different numbers.
    twins = [Article(LAW, "", "又" + a.number, a.text.replace("书面", "口头")) for a in one]
    for pair in continuation_pairs([*one, *twins]):
        first = pair.content["chosen"][0]["content"].split("：\n")[1]
        rejected = pair.content["rejected"][1]["content"]
        assert all(first + rejected != article.text for article in [*one, *twins])
    same = [Article(LAW, "", f"第{n}条", law_of(1)[0].text) for n in range(40)]
    assert list(continuation_pairs(same)) == []


def test_ranked_pairs_keep_the_system_message_and_all_turns() -> None:
    published = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "u1"},
            {"from": "gpt", "value": "a1"},
            {"from": "human", "value": "u2"},
        ],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    [row] = ranked_pairs([published])
    roles = [message["role"] for message in row.content["chosen"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert row.group == "u1", "the group is the first user message"
    assert row.content["rejected"][-1] == {"role": "assistant", "content": "bad"}


def test_answers_about_statutes_quote_an_article_verbatim() -> None:
    text = "本法所称安全生产，是指在生产经营活动中保障人身安全的工作。"
    purpose = "为了加强安全生产工作，根据宪法，制定本法。"
    rows = list(
        statute_conversations(
            [Article(LAW, "", "第一条", purpose), Article(LAW, "", "第二条", text)]
        )
    )
    answers = {
        row.content["messages"][0]["content"]: row.content["messages"][1]["content"] for row in rows
    }
    assert answers["《虚构的法》的立法目的是什么？"] == purpose
    assert answers["《虚构的法》所称的安全生产是指什么？"] == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [("小智", "我是小智，由小智开发。"), ("Li Lei", "我是 Li Lei，由 Li Lei 开发。")],
)
def test_a_name_is_filled_in_without_stray_spaces(value: str, expected: str) -> None:
    assert fill_in("我是 {{name}}，由 {{name}} 开发。", "{{name}}", value) == expected
    assert fill_in("I am {{name}}.", "{{name}}", r"\1{{author}}") == r"I am \1{{author}}."


def test_identity_rows_are_repeated_and_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    published = [{"instruction": "你是谁", "output": "我是 {{name}}。"}]
    monkeypatch.setattr("tools.prepare_data.rows.read_json", lambda *_: published)
    rows = list(identity_rows(Path("unread"), "阿明", "我", 3))
    assert len(rows) % 3 == 0 and len(rows) > 30
    assert {row.source for row in rows} == {"identity"}
    assert not any("{{" in row.line for row in rows)


def test_the_default_author_is_in_the_language_of_the_answer(monkeypatch) -> None:
    published = [{"instruction": "hi", "output": "I am {{name}}, developed by {{author}}."}]
    monkeypatch.setattr("tools.prepare_data.rows.read_json", lambda *_: published)
    text = "\n".join(row.line for row in identity_rows(Path("unread"), "小智", None, 1))
    assert "I am 小智, developed by a hobbyist." in text
    assert "一位爱好者开发了我，我的名字是小智。" in text
    assert "由我" not in text and "by 我" not in text and "by me" not in text
