"""Files that a finished run adds to final/: the model card, its picture, run.yaml without paths.

The card is card.md, filled. Its header has the keys that Hugging Face and ModelScope read; Hugging
Face rejects a base_model that is no repository, and a licence that nobody chose is `other`. The
files name no path of this machine, because final/ is made to be published.
"""

from __future__ import annotations

import contextlib
import json
import operator
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from model import count_parameters
from tokenizer.bpe import Tokenizer
from trainlib.core.hardware import cpu_name
from trainlib.core.settings import provenance, recipe, resolved, run_yaml, with_value
from trainlib.data.token_cache import TokenCache
from trainlib.engine.metrics import TRAIN_TOKENS, VAL_LOSS, read_metrics
from trainlib.engine.progress import SKILLS, validation_tables
from trainlib.engine.run import RunConfig
from trainlib.engine.training import Training
from trainlib.evaluation.curve import draw_curve
from trainlib.evaluation.skills import format_counts

PATH_KEYS = ("out_dir", "resume", "tokenizer", "init_from", "data.files", "data.val_files")
MAIN_SETTINGS = ("tokens_per_step", "sequence_length", "beta", "optim.name", "optim.muon_lr",
                 "optim.adamw_lr", "optim.embedding_lr", "optim.schedule", "seed")  # fmt: skip
STAGES = {"pretrain": "pretraining", "sft": "supervised fine-tuning (SFT)",
          "dpo": "direct preference optimization (DPO)"}  # fmt: skip
LANGUAGES = {"en": (r"\b(?:the|of|and)\b", 0.001), "zh": ("[一-鿿]", 0.04)}
"""By code: a pattern, and its least number of matches per character of the training data."""
WEAK = 0.5
"""A skill with a smaller share of correct answers is listed among what the model cannot do."""


def final_files(training: Training, tokenizer: Tokenizer, step: int) -> dict[str, bytes]:
    """Return the files by name, for a model with the weights of a step.

    Reads metrics.jsonl and, if it exists, skills.json of the run.
    """
    run, metric, baselines = training.run, "bits_per_byte", training.datasets.baselines
    if run.stage == "dpo":
        metric, baselines = "reward_accuracy", {"chance": 0.5}
    rows = [row for row in read_metrics(run.folder) if row["step"] <= step]
    val = [(row["step"], row[f"val/{metric}"]) for row in rows if f"val/{metric}" in row]
    config = without_paths(resolved(run.config, precision=run.hardware.precision))
    text = card(training, tokenizer, rows)
    files = {"README.md": text.encode(), "run.yaml": run_yaml(config).encode()}
    if val:  # Without a finite value there is no curve.
        files["curve.png"] = draw_curve(metric.replace("_", " "), val, baselines)
    return files


def without_paths(config: RunConfig) -> RunConfig:
    """Return the settings with names instead of paths, also in the sources of the values."""
    for key, source in provenance(config).items():
        value = operator.attrgetter(key)(config)
        if key in PATH_KEYS:
            is_list = isinstance(value, tuple)
            value = tuple(Path(item).name for item in value) if is_list else Path(value).name
        config = with_value(config, key, value, Path(source).name)
    return config


def card(training: Training, tokenizer: Tokenizer, rows: list[dict[str, float]]) -> str:
    """Return the text of the card; `rows` are the rows of metrics.jsonl."""
    run, caches = training.run, training.datasets.train.caches
    base, data = read_base(run.config.init_from)
    codes = languages(tokenizer, caches, base.get("language", ()))
    pretrained = run.stage == "pretrain"
    header = {
        "language": codes,
        "license": base.get("license", "other"),
        "license_name": base.get("license_name", None if "license" in base else "not-chosen"),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tasks": ["text-generation"],  # ModelScope's name for pipeline_tag.
        "frameworks": ["pytorch"],
        "tags": [run.stage] if pretrained else [run.stage, "conversational"],
    }
    path = run.folder / "skills.json"
    skills = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    limits = ["- It continues texts and does not answer."] if pretrained else []
    if weak := ", ".join(kind for kind, s in skills.items() if s["correct"] < WEAK * s["total"]):
        limits.append(f"- Less than half of its answers are correct in: {_cell(weak)}.")
    chat = json.dumps([{"role": "user", "content": "Who are you?"}])
    base_name = f"the model in `{Path(run.config.init_from).name}`"
    return Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(
        header=yaml.safe_dump({k: v for k, v in header.items() if v}),
        size=f"{count_parameters(training.model) / 1e6:,.1f}M",
        stage=STAGES[run.stage],
        origin=base_name if run.config.init_from else "random weights",
        data="\n".join([*data, *(row for cache in caches for row in data_rows(run.stage, cache))]),
        training=_training(training, rows),
        results="\n".join(_results(rows, training.datasets.baselines, skills)),
        context=training.model.config.max_position_embeddings,
        used=run.config.sequence_length,
        limits="\n".join(limits),
        example='"第一条"' if pretrained else chat,
        raw=" --raw" * pretrained,
    )  # fmt: skip


def read_base(folder: str) -> tuple[dict[str, Any], list[str]]:
    """Return language and licence in the header of init_from's card, and its rows on the data."""
    path = Path(folder, "README.md")
    text = path.read_text(encoding="utf-8", errors="replace") if folder and path.is_file() else ""
    header, rows = None, re.search("<!-- begin data -->\n(.*)<!-- end data -->", text, re.S)
    if found := re.match("---\n(.*?)\n---\n", text, re.S):
        with contextlib.suppress(yaml.YAMLError):
            header = yaml.safe_load(found[1])
    known = header if isinstance(header, dict) else {}
    header = {k: known[k] for k in ("language", "license", "license_name") if known.get(k)}
    return header, rows[1].splitlines()[2:] if rows else []


def languages(tokenizer: Tokenizer, caches: list[TokenCache], known: Iterable[str]) -> list[str]:
    """Return the codes of the languages in excerpts from the files, and of the `known` ones."""
    text = " ".join(
        tokenizer.decode(cache.ids[i : i + 500].tolist())
        for cache in caches
        for i in range(0, len(cache.ids), max(500, len(cache.ids) // 40))
    )
    return [
        code for code, (pattern, share) in LANGUAGES.items()
        if code in known or len(re.findall(pattern, text)) > share * len(text)
    ]  # fmt: skip


def data_rows(stage: str, cache: TokenCache) -> list[str]:
    """Return a table row for each licence in a file, from SOURCES.json in its folder, if any."""
    licences: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        listed = json.loads(cache.path.with_name("SOURCES.json").read_text(encoding="utf-8"))
        for source, entry in listed["files"][cache.path.name]["sources"].items():
            packages = [listed["packages"][name] for name in entry.get("packages", ())]
            texts = [f"{p['name']} {p['version']}: {p['licence']}" for p in packages]
            licences[source] = "; ".join(texts) or "generated"
    sizes = np.bincount(cache.sources, cache.record_lengths, len(cache.source_names))
    names, tokens = defaultdict(list), defaultdict(int)
    for source, size in zip(cache.source_names, sizes, strict=True):
        if size:  # A source that is not listed has no name here, which might be private.
            licence = licences.get(source, "not recorded")
            names[licence] += [source] if source in licences else []
            tokens[licence] += int(size)
    return [
        f"| {stage} | {_cell(': '.join(filter(None, [cache.path.name, ', '.join(sources)])))} | "
        f"{tokens[licence]:,} | {_cell(licence)} |"
        for licence, sources in names.items()
    ]


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table."""
    return re.sub(r"([\\|`*_<\[])", r"\\\1", " ".join(text.split()))


def _training(training: Training, rows: list[dict[str, float]]) -> str:
    run, settings = training.run, recipe(training.run.config)
    on_gpu, ranks = run.hardware.device.type == "cuda", run.distributed.world_size
    device = torch.cuda.get_device_name(run.hardware.device) if on_gpu else cpu_name()
    tokens = max((row[TRAIN_TOKENS] for row in rows if TRAIN_TOKENS in row), default=0)
    values = ", ".join(f"{key}={settings[key]}" for key in MAIN_SETTINGS if key in settings)
    return (
        f"- {rows[-1]['step']:,} steps on {tokens:,} tokens in {run.clock.seconds() / 3600:.2f} "
        f"hours, with `{values}`. run.yaml has all settings.\n"
        f"- {device}, {ranks} process{'es' * (ranks > 1)}, {run.hardware.precision}, "
        f"torch {torch.__version__}"
    )


def _results(
    rows: list[dict[str, float]], baselines: dict[str, float], skills: dict[str, dict[str, float]]
) -> list[str]:
    """Return tables of the first and the last evaluation, baselines, and a table of the skills."""
    evaluations, lines = [row for row in rows if VAL_LOSS in row], []
    for row in [*evaluations[:1], *evaluations[1:][-1:]]:
        shown = {k: v for k, v in row.items() if k.startswith("val/") and not k.startswith(SKILLS)}
        lines += validation_tables(int(row["step"]), shown)
    lines += [f"{name} baseline: {value:.3f} bits per byte" for name, value in baselines.items()]
    return [*lines, *(format_counts(skills) if skills else [])]
