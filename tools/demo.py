"""`make demo`: train a model in three stages on the sample, chat with it, and print the figures.

Running it again resumes an interrupted demo, or prints the figures of a finished one.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

from tools.demo_figures import SAMPLE, fenced, report, summary
from tools.growth import write_page
from trainlib.core.errors import UserError
from trainlib.core.files import move_aside, write_atomically
from trainlib.core.terminal import use_replacement_characters, valid_text
from trainlib.data.formats import STAGES

DEMO = Path("runs/demo")
READMES = (Path("README.md"), Path("README.zh-CN.md"))
PAGES = (Path("docs/demo.md"), Path("docs/demo.zh-CN.md"))
BEGIN, END = "<!-- begin transcript -->", "<!-- end transcript -->"


def prepare(name: str, author: str | None, quick: bool) -> None:
    """Fetch the sample or rewrite its identity rows; move aside a demo made with other options."""
    stamp = DEMO / "identity.txt"
    identity = f"{name}\n{author or ''}\n" + ("quick\n" if quick else "")
    earlier = stamp.read_text(encoding="utf-8") if stamp.is_file() else ""
    same, same_names = earlier == identity, earlier.splitlines()[:2] == identity.splitlines()[:2]
    if DEMO.exists() and not same:
        print(f"moved the earlier demo, which was made with other options, to {move_aside(DEMO)}")
    # A sample without README.md has rows in an earlier format.
    complete = all((SAMPLE / name).is_file() for name in ("SOURCES.json", "README.md"))
    if not same_names or not complete:
        author_option = ["--author", author] if author else []
        call(["-m", "tools.prepare_data", "--name", name, *author_option])
    DEMO.mkdir(parents=True, exist_ok=True)
    stamp.write_text(identity, encoding="utf-8")


def call(arguments: list[str], capture: bool = False) -> str:
    """Run one of the project's programs, and return its stdout if captured; exit if it fails.

    Ctrl-C reaches the program too, which then saves a checkpoint. This process waits for it.
    """
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    stdout = subprocess.PIPE if capture else None
    done = subprocess.run([sys.executable, *arguments], stdout=stdout, encoding="utf-8")
    signal.signal(signal.SIGINT, handler)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def train(stage: str, quick: bool) -> None:
    """Run one stage on the sample unless it is finished; exit if the user stops it."""
    out_dir = DEMO / stage
    if (out_dir / "final").is_dir():
        return
    print(f"\n== {stage} ==", flush=True)
    files, val = [SAMPLE / f"{stage}.jsonl"], sorted((SAMPLE / "val" / stage).glob("*.jsonl"))
    if quick:
        val = [first_rows(path) if path.stem == "skills" else path for path in val]
    elif stage == "dpo":
        files.append(skill_pairs())
    before = {"sft": "pretrain", "dpo": "sft"}.get(stage)
    arguments = [
        STAGES[stage],
        f"configs/tiny_{stage}.yaml",
        f"out_dir={out_dir}",
        f"data.files=[{','.join(map(str, files))}]",
        f"data.val_files=[{','.join(map(str, val))}]",
    ]
    if before:
        arguments.append(f"init_from={DEMO / before / 'final'}")
    if quick:
        arguments += ["max_steps=6", "data.val_max_rows=2"]
    call(arguments)
    if not (out_dir / "final").is_dir():
        print("stopped; run `make demo` to resume")
        sys.exit(0)
    if stage != "dpo":
        print("(make demo runs the next stage now)")


def first_rows(path: Path) -> Path:
    """Return a copy of a file of questions with its first rows, which hold all kinds."""
    copy = DEMO / f"{path.parent.name}_{path.name}"
    with path.open(encoding="utf-8") as lines:
        copy.write_text("".join(islice(lines, 150)), encoding="utf-8")
    return copy


def skill_pairs() -> Path:
    """Return the file of pairs from the wrong answers of the fine-tuned model; write it if new."""
    command = ["-m", "tools.prepare_data", "--skill-pairs", str(DEMO / "sft" / "final")]
    print("asking the fine-tuned model questions, for pairs of right and wrong answers", flush=True)
    output = call(command, capture=True)
    print(output, end="")
    # Relative, because the paths are part of the run's recipe, and the project may be moved.
    return Path(os.path.relpath(output.splitlines()[-1]))


def write_pages(blocks: dict[Path, str]) -> None:
    """Replace the text between the markers in each file with its block.

    Raises UserError and writes nothing if any file lacks its markers.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in blocks}
    for path, text in texts.items():
        if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
            raise UserError(f"{path} needs one line {BEGIN} followed by one line {END}")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        texts[path] = f"{before}{BEGIN}\n{blocks[path]}\n{END}{after}"
    for path, text in texts.items():
        write_atomically(path, text)


def finished_name() -> str:
    """Return the name of a finished demo's model; raises UserError without a full demo."""
    files = [DEMO / "identity.txt", DEMO / "dpo" / "report.json"]
    files += [DEMO / stage / "final" / "model.safetensors" for stage in STAGES]
    for path in files:
        if not path.is_file():
            raise UserError(f"no finished demo: {path} does not exist. Run `make demo` first.")
    name, *rest = files[0].read_text(encoding="utf-8").splitlines()
    if "quick" in rest[1:]:
        raise UserError(f"{DEMO} is a quick demo, for a test only. Run `make demo` first.")
    return name


def main() -> None:
    """Run the demo, or print the figures of a finished one."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--name", type=valid_text, default="小智", help="name of the assistant")
    parser.add_argument(
        "--author", type=valid_text, help="who made the assistant (default: 一位爱好者, a hobbyist)"
    )
    parser.add_argument("--quick", action="store_true", help="run six steps per stage, as a test")
    parser.add_argument(
        "--transcript", action="store_true", help="print the figures of a finished demo as Markdown"
    )
    parser.add_argument(
        "--write-readme", action="store_true", help="also write them to READMEs and docs/demo*.md"
    )
    options = parser.parse_args()
    if options.transcript or options.write_readme:
        try:
            text = report(DEMO, finished_name(), quick=False)
            transcript, short = fenced(text.splitlines()), summary(text)
            print(transcript)
            if options.write_readme:
                pages = dict.fromkeys(PAGES, transcript)
                write_pages({**dict.fromkeys(READMES, short), **pages})
        except UserError as error:
            sys.exit(f"error: {error}")
        return
    prepare(options.name, options.author, options.quick)
    for stage in STAGES:
        train(stage, options.quick)
    print(f"\n{report(DEMO, options.name, options.quick)}")
    print(f"\nHow it grew, in a browser: {write_page([DEMO / stage for stage in STAGES])}")
    print(f"\nChat with it: {sys.executable} chat.py --model {DEMO / 'dpo' / 'final'}")


if __name__ == "__main__":
    main()
