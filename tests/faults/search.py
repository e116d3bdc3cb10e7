"""Search for faults that a run does not survive: `make faults`, or with FAULTS=--help.

A warmed process forks a child for each try, a stage with real files that a fault disturbs; the same
command, typed once more, must end with the weights of an undisturbed run.
"""

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import contextlib
import ctypes
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import torch._dynamo  # noqa: F401  # Imported once here, because every optimizer imports it.

from tests.support.stages import STAGES
from trainlib.core.settings import keys
from trainlib.data import token_cache, tokenize_files
from trainlib.engine import flops
from trainlib.engine.launch import launch

PAGE, BEGIN, END = Path("docs/reliability.md"), "<!-- faults: begin -->", "<!-- faults: end -->"
BASE, LIBRARY = Path(os.environ["FAULTS_FOLDER"]), ctypes.CDLL(os.environ["LD_PRELOAD"])
CLASSES = ("survived", "crude", "lost", "wrong", "hung")
WHOLE, TIMEOUT = 3300, 60  # Seconds: of the whole search, and without an exit until it is hung.
STEPS, SAVE_EVERY, SAME = 6, 2, 6  # SAME: tries of calls that differ only in numbers.
SETTINGS = f"""max_steps={STEPS} save_every_steps={SAVE_EVERY} eval_every_steps=3 log_every_steps=1
keep_best=true keep_checkpoints=3 tokens_per_step=64 micro_batch_size=2 data.val_max_rows=4
device=cpu precision=fp32 compile=off sequence_length=32"""
MODEL = """sequence_length=16 model.max_position_embeddings=16 model.hidden_size=16
model.head_dim=16 model.intermediate_size=16 model.num_hidden_layers=1 model.num_attention_heads=1
model.num_key_value_heads=1"""
SCENARIOS = {  # Stage, the files that it starts with, where its calls can fail, settings.
    "base": ("pretrain", "empty", "out", f"{MODEL} model.max_position_embeddings=48"),
    "token cache": ("pretrain", "empty", "cache", MODEL),
    "fresh run": ("pretrain", "tokens", "out", MODEL),
    "resume": ("pretrain", "killed", "out", MODEL),
    "SFT": ("sft", "empty", "out", "init_from=BASE/base"),
    "DPO": ("dpo", "empty", "cache", "init_from=BASE/base"),
    "DPO values": ("dpo", "references", "out", "init_from=BASE/base"),
    "unfinished cache": ("pretrain", "unfinished", "cache", MODEL),
    "tokenizing pool": ("pretrain", "empty", "cache", f"{MODEL} data.files=BASE/large.jsonl"),
    "two ranks": ("pretrain", "tokens", "out", f"{MODEL} ranks=2"),
}
FAILURES = {  # The mode in fault.c, and the error.
    "kill before a call": (1, 0), "kill in or after a call": (2, 0),
    "full disk, once": (3, errno.ENOSPC), "full disk from then on": (4, errno.ENOSPC),
    "I/O error, once": (3, errno.EIO),
}  # fmt: skip
DAMAGES = ("flipped bit", "cut short", "emptied", "zeroed", "removed", "other JSON", "folder")
CALLS, SECONDS = {}, {}  # Of an undisturbed run: (call, whether it needs space); its duration.
Try = namedtuple("Try", "kind scenario what where number", defaults=(0,))


def start(name: str, work: Path, arm: tuple[int, ...] = (-1, 0, 0, -1), extra: str = "") -> int:
    """Fork a child that runs the command of a scenario in a folder; return its process id."""
    if pid := os.fork():
        return pid
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # End with the process that started it.
    os.setsid()  # Ctrl-C on the terminal ends the search, and not one try.
    output = os.open(work / "nohup.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    os.environ["TRAIN_LLM_CACHE_DIR"] = str(work / "cache")
    stage, _, folder, settings = SCENARIOS[name]
    script, module, cls = STAGES[stage]
    settings = f"{SETTINGS} out_dir={work}/out data.files=BASE/{stage}.jsonl {settings} {extra}"
    sys.argv = [script, f"configs/{stage}.yaml", *settings.replace("BASE", str(BASE)).split()]
    tokenize_files.SMALL_FILE_BYTES = 1 if name == "tokenizing pool" else 1 << 20
    LIBRARY.fault_arm(*arm, str(work / folder).encode())
    launch(cls, stage, module.prepare, module.main)
    sys.exit()


def family(pid: int) -> list[int]:
    """Return a process and its descendants, the oldest first."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


def wait(pid: int, work: Path) -> tuple[int | None, str]:
    """Wait for a child and its descendants; return exit code (None: hung) and output."""
    code, end = None, time.monotonic() + TIMEOUT
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < end:
            ended, status = os.waitpid(-1, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended == pid else code
            time.sleep(0 if ended else 0.005)
        code = None
        for member in family(os.getpid())[:0:-1]:
            os.kill(member, signal.SIGKILL)
    return code, (work / "nohup.out").read_text(errors="replace")


def use_state(name: str, work: Path) -> Path:
    """Fill a folder with the files that the command of a scenario starts with; return it."""
    shutil.rmtree(work, ignore_errors=True)
    return shutil.copytree(BASE / "states" / SCENARIOS[name][1], work)


def undisturbed(name: str) -> Path:
    """Run a command undisturbed; record its calls that change files, its seconds and weights."""
    work, report, begin = use_state(name, BASE / "run"), BASE / "calls", time.monotonic()
    with report.open("w") as file:
        code, text = wait(start(name, work, (0, 0, 0, file.fileno())), work)
    assert code == 0, text
    SECONDS[name] = time.monotonic() - begin
    lines = report.read_text().replace(f"{work}/", "").splitlines()
    CALLS[name] = [(line[2:], line[0] == "1") for line in lines]
    shutil.copy(work / "out/final/model.safetensors", BASE / f"expected {name}")
    return work


def make_state(name: str, source: str, call: str, n: int, file: str, content: bytes) -> None:
    """Make a state: a command that is killed after its n-th such call, with this in a file."""
    undisturbed(source)
    at = [i for i, (other, _) in enumerate(CALLS[source], 1) if re.match(call, other)][n - 1]
    work = BASE / "states/empty"
    while not any(content in path.read_bytes() for path in work.glob(file)):
        at, work = at + 1, use_state(source, BASE / "run")  # Threads change the order of calls.
        wait(start(source, work, (at, 1, 0, -1)), work)
    work.rename(BASE / "states" / name)


def prepare() -> None:
    """Write the data, run each command undisturbed, and make the states."""
    data: dict[str, list] = defaultdict(list)
    for i in range(120):
        text, question = f"Row {i} is a text about {i}. " * 5, {"from": "human", "value": f"{i}?"}
        good, bad = ({"from": "gpt", "value": value} for value in (text[:16], "?"))
        data["pretrain"].append({"text": text})
        data["large"] += [{"text": text * 3}] * 3
        data["sft"].append({"conversations": [question, good]})
        data["dpo"].append({"conversations": [question], "chosen": good, "rejected": bad})
    for name, values in data.items():
        (BASE / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    (BASE / "states/empty/cache").mkdir(parents=True)
    shutil.copytree(undisturbed("base") / "out/final", BASE / "base")
    shutil.copytree(undisturbed("token cache") / "cache", BASE / "states/tokens/cache")
    make_state(
        "unfinished", "token cache", "rename .*progress", 3, "cache/*/.making*/progress.json", b""
    )
    make_state("killed", "fresh run", "rename out/latest", 2, "out/latest", b"step_000004")
    make_state("references", "DPO", "rename cache/reference", 1, "cache/reference/*", b"")
    (BASE / "states/killed/out/notes.txt").write_text("A file of the user.")
    for name in SCENARIOS.keys() - CALLS.keys():
        undisturbed(name)


def plan_tries(chance: random.Random) -> list[Try]:
    """Return all tries in random order, so that any first ones are of all classes."""
    tries, seen = [], Counter()
    for name in ("token cache", "fresh run", "resume", "DPO", "DPO values"):
        for number, (call, space) in chance.sample([*enumerate(CALLS[name], 1)], len(CALLS[name])):
            seen[pattern := name + re.sub(r"\d+", "N", call)] += 1
            tries += [Try(kind, name, kind, call, number) for kind, (_, error) in FAILURES.items()
                      if seen[pattern] <= SAME and (space or error != errno.ENOSPC)]  # fmt: skip
    for name in ("token cache", "fresh run", "resume", "SFT", "DPO"):
        tries += [Try("SIGKILL at a random moment", name, "SIGKILL", "0")] * 12
        for text in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
            tries += [Try("signal", name, words, "0") for words in (text, f"{text} {text}")] * 3
    tries += [Try("killed tokenizing process", "tokenizing pool", "SIGKILL", "1")] * 20
    for name in ("resume", "unfinished cache", "DPO values"):
        state = BASE / "states" / SCENARIOS[name][1]
        files = [path.relative_to(state) for path in state.rglob("[!n]*") if path.is_file()]
        tries += [Try("damaged file", name, how, str(f)) for f in files for how in DAMAGES]
    for what in ("SIGKILL", "SIGTERM", "SIGSEGV", "SIGINT SIGINT"):  # The launcher and its ranks.
        tries += [Try("one of two ranks", "two ranks", what, process) for process in "012" * 3]
    chance.shuffle(tries)
    groups = [[t for t in tries if t.kind == kind] for kind in dict.fromkeys(t.kind for t in tries)]
    return [try_ for turn in itertools.zip_longest(*groups) for try_ in turn if try_]


def damage(path: Path, how: str, chance: random.Random) -> None:
    """Damage a file, or put a folder in its place."""
    data = bytearray(path.read_bytes())
    if how == "flipped bit" and data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "removed":
        changed = {"cut short": data[: len(data) // 2], "emptied": b"", "zeroed": bytes(len(data))}
        path.write_bytes({**changed, "other JSON": b'{"other": [1]}'}.get(how, data))


def disturb(try_: Try, work: Path, chance: random.Random) -> tuple[int | None, str]:
    """Run a command, and send signals to one of its processes at a random moment."""
    pid, index, seconds = start(try_.scenario, work), int(try_.where), SECONDS[try_.scenario]
    end = time.monotonic() + 2 * seconds
    time.sleep(chance.uniform(0.05, seconds))
    while len(members := family(pid)) <= index and time.monotonic() < end:
        time.sleep(0.01)  # The pool or the ranks have not started.
    for text in try_.what.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(members[min(index, len(members) - 1)], getattr(signal, text))
        time.sleep(chance.uniform(0.01, 0.2))
    return wait(pid, work)


def attempt(try_: Try, work: Path, chance: random.Random) -> tuple[str, str]:
    """Try a fault; return the class of the result, and the output of the commands."""
    name, weights = try_.scenario, use_state(try_.scenario, work) / "out/final/model.safetensors"
    expected = (BASE / f"expected {name}").read_bytes()
    first, text, notes = 0, "", [*work.glob("out/notes.txt")]
    if try_.kind == "damaged file":
        damage(work / try_.where, try_.what, chance)
    elif try_.kind in FAILURES:
        first, text = wait(start(name, work, (try_.number, *FAILURES[try_.kind], -1)), work)
    else:
        first, text = disturb(try_, work, chance)
    paths = (path.parent for path in work.glob("out/step_*/train_state.json"))  # Written last.
    steps = {int(path.name[5:]) for path in paths if path.name not in try_.where}
    done = [*map(int, re.findall(r"^step (\d+) loss", text, re.M))]
    if first == -signal.SIGKILL or "then on" in try_.kind:  # The last one may not be complete.
        latest = work / "out/latest"
        steps, done = steps & {int(latest.read_text()[5:] or 0) if latest.is_file() else 0}, []
    least = max(0, 0, *steps, *(step // SAVE_EVERY * SAVE_EVERY for step in done))
    least *= "out/best" not in try_.where  # The best weights are searched again from further back.
    broken = weights.parent.exists() and (not weights.exists() or weights.read_bytes() != expected)
    code, output = wait(start(name, work), work)
    text += f"---- exit code {first}; typed again\n{output}"
    if first is None or code is None:
        return "hung", text
    crude = code or "Traceback (most" in text or first and re.search("USR1|HUP", try_.what)
    if code:
        setting = re.search(r"resume=(?:never|\S*step_\d+)", output.rpartition("error: ")[2])
        if not setting and try_.kind == "damaged file":  # Rebuild, as the message says.
            damaged = Path(*Path(try_.where).parts[: 1 + try_.where.startswith("out")])
            os.system(f"rm -rf {work / damaged}")
        code, output = wait(start(name, work, extra=setting[0] if setting else ""), work)
        text += f"---- exit code {code}; with the fix\n{output}"
    resumed = map(int, re.findall(r"resuming from \S*step_(\d+)", output))
    step = STEPS if "already finished" in output else max(resumed, default=0)
    text += f"---- exit code {code}; resumed from step {step}, at least {least} was possible\n"
    if broken or code == 0 and (not weights.exists() or weights.read_bytes() != expected):
        return "wrong", text
    if code or step < least or notes and not [*work.glob("out*/notes.txt")]:
        return "lost", text
    return "crude" if crude else "survived", text


def work_on(tries: list[Try], seed: str, work: Path, end: float, log: Path) -> None:
    """Try faults until the time is up; append class and first error of each try to a file."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # End with the main process.
    ctypes.CDLL(None).prctl(36, 1)  # Become the parent of orphans.
    for index, try_ in enumerate(itertools.takewhile(lambda _: time.monotonic() < end, tries)):
        result, text = attempt(try_, work, random.Random(f"{seed} {index}"))
        error = re.search(r"^(?:error: .*|\w*(?:Error|Interrupt)\b.*)|\Z", text, re.M)[0]
        what = " ".join(dict.fromkeys(try_[1:4]))
        line = f"{result}: `{what}: {error.replace(str(work), '')[:160]}`"
        with (BASE / "results").open("a") as file:
            file.write(json.dumps([try_.kind, result, line]) + "\n")
        if result != "survived":
            print(line, flush=True)
            (log / f"{result}-{work.name}-{index}.txt").write_text(f"{try_}\n{text}")


def table(results: list[tuple[str, str, str]]) -> str:
    """Return the results as a Markdown table, and a list of those that did not survive."""
    rows = [f"| fault | tries | {' | '.join(CLASSES)} |", "| --- |" + " ---: |" * 6]
    for kind in (*sorted({kind for kind, _, _ in results}), "all"):
        counts = Counter(result for k, result, _ in results if kind in (k, "all"))
        numbers = [f"{n:,}" for n in (sum(counts.values()), *(counts[name] for name in CLASSES))]
        rows.append(f"| {kind} | {' | '.join(numbers)} |")
    return "\n".join([*rows, "", *sorted(f"* {line}" for _, r, line in results if r != CLASSES[0])])


def main() -> None:
    """Search, print the table, and write it to the page unless only a sample was tried."""
    parser = argparse.ArgumentParser(prog="make faults FAULTS=...", description=__doc__)
    parser.add_argument("--seconds", type=int, help="try a random sample, and keep the page")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--only", default="", help="regular expression: 'full disk.*resume'")
    parser.add_argument(
        "--log", type=Path, default=BASE, help="folder for the output of other tries"
    )
    options = parser.parse_args()
    tokenize_files.CHUNK_BYTES, token_cache.SAVE_SECONDS, flops.PEAK_SECONDS = 1 << 12, 0, 0.01
    _ = [keys(cls) for _, _, cls in STAGES.values()]  # Reads the source of the settings once.
    prepare()
    tries = [t for t in plan_tries(random.Random(options.seed)) if re.search(options.only, str(t))]
    print(f"{len(tries):,} tries possible, seed {options.seed}", flush=True)
    end = time.monotonic() + (options.seconds or WHOLE)
    for i in range(2):
        if not os.fork():
            work_on(tries[i::2], f"{options.seed} {i}", BASE / f"worker{i}", end, options.log)
            os._exit(0)
    assert [os.wait()[1] for _ in range(2)] == [0, 0]
    results = [json.loads(line) for line in (BASE / "results").read_text().splitlines()]
    print(table(results))
    if not options.seconds and not options.only:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        text = f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"
        PAGE.write_text(text, encoding="utf-8")
    sys.exit(any(result in CLASSES[2:] for _, result, _ in results))


if __name__ == "__main__":
    main()
