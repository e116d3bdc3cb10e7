"""Tests that errors are reported at the start of a run, before anything is written.

Every case is a command line of a stage, run in this process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import ModelConfig, Transformer
from tokenizer.bpe import Tokenizer, default_folder
from trainlib.core.errors import UserError
from trainlib.data.token_cache import build_cache
from trainlib.models.hf_folder import model_files

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "sft", "dpo")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
COMMON = ["tokens_per_step=128", "sequence_length=64", "max_steps=2", "device=cpu", "out_dir=out"]
COMMON += ["micro_batch_size=2", "eval_every_steps=0"]
MODEL = [f"model.{name}={value}" for name, value in SIZES.items()]


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def pair(chosen: list, rejected: list) -> dict:
    return {"chosen": chosen, "rejected": rejected}


TEXTS = [{"text": f"row {i} goes on and on"} for i in range(40)]
TALKS = [{"conversations": talk(f"q {i}", f"answer {i}")} for i in range(40)]
PAIRS = [pair(talk(f"q {i}", "yes"), talk(f"q {i}", "no")) for i in range(40)]
LONG = "a long answer " * 40
FILES = {
    "pretrain.jsonl": TEXTS, "sft.jsonl": TALKS, "dpo.jsonl": PAIRS, "empty.jsonl": [],
    "no_text.jsonl": [*TEXTS[:3], {"body": "x"}],
    "no_turns.jsonl": [*TALKS[:3], {"talk": []}],
    "no_rejected.jsonl": [*PAIRS[:3], {"chosen": talk("a", "b")}],
    "prompts.jsonl": [*PAIRS[:3], pair(talk("a", "yes"), talk("b", "no"))],
    "long_sft.jsonl": [*TALKS, {"conversations": talk("q", LONG)}],
    "long_dpo.jsonl": [*PAIRS, pair(talk("q", LONG), talk("q", "no"))],
    "all_long.jsonl": [{"conversations": talk(f"q {i}", LONG)} for i in range(3)],
}  # fmt: skip


def write_model(folder: Path, tokenizer: Tokenizer, **changes: object) -> None:
    """Write a model folder with random weights, and with `changes` in its config.json."""
    folder.mkdir()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES))
    for name, content in model_files(model.config, tokenizer).items():
        (folder / name).write_text(content, encoding="utf-8")
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tokenizer):
    """Return a folder like a user's, with valid and invalid data and models."""
    path = tmp_path_factory.mktemp("workdir")
    (path / "configs").symlink_to(ROOT / "configs")
    for name, rows in FILES.items():
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    (path / "c.yaml").write_text("max_steps: 3\nmax_tokens: 99\noptim:\n  muon_rl: 1\nsead: 4\n")
    (path / "broken.yaml").write_text("max_steps: 3\nmodel: [\n")
    (path / "bad_tokenizer").mkdir()
    (path / "bad_tokenizer/tokenizer.json").write_text('{"version": "1.0"}')
    write_model(path / "base", tokenizer)
    (path / "run").mkdir()
    write_model(path / "run/final", tokenizer)
    write_model(path / "llama", tokenizer, architectures=["LlamaForCausalLM"])
    write_model(path / "small", tokenizer, vocab_size=100)
    write_model(path / "wide", tokenizer, hidden_size=64)
    return path


@pytest.fixture
def run(workdir, tmp_path, monkeypatch, capsys, run_stage):
    """Return a function that runs a stage there and returns the exit code and the output."""
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(tmp_path / "cache"))

    def stage(name: str, *settings: str) -> tuple[int, str]:
        words = [f"data.files={name}.jsonl", *COMMON]
        words += MODEL if name == "pretrain" else ["init_from=base"]
        code = run_stage(name, *words, *settings)
        out, err = capsys.readouterr()
        return code, out + err

    return stage


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the modification time and the bytes of every file under a folder."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


# Stage, settings, and texts that the message must contain.
CASES = [
    ("pretrain", "optim.muon_rl=1", "optim.muon_rl=1 (command line): unknown key",
     "did you mean optim.muon_lr?"),
    ("dpo", "betta=1", "betta=1 (command line): unknown key; did you mean beta?"),
    ("sft", "model.head_dim=64", "model.head_dim=64 (command line): unknown key"),
    ("pretrain", "--max-steps=5", "--max-steps=5", "without dashes: max_steps=5"),
    ("pretrain", "seed=x optim.muon_lr=fast", "2 problems",
     "seed=x (command line): expected an integer",
     "optim.muon_lr=fast (command line): expected a number"),
    ("pretrain", "precision=fp8", "precision=fp8 (command line): expected auto or fp32"),
    ("pretrain", "model.tie_word_embeddings=maybe", "expected on or off"),
    ("pretrain", "tokens_per_step=0 model.head_dim=3 model.rope_theta=0 optim.grad_clip=-1",
     "4 problems", "tokens_per_step=0 must be at least 1", "model.head_dim=3 must be even",
     "model.rope_theta=0.0 must be above 0", "optim.grad_clip=-1.0 must be at least 0"),
    ("dpo", "beta=0 log_every_steps=0", "2 problems",
     "beta=0.0 must be above 0 (beta: command line)",
     "log_every_steps=0 must be at least 1"),
    ("pretrain", "optim.warmup_fraction=0.6 optim.decay_fraction=0.6", "must be at most 1"),
    ("pretrain", "max_steps=1 epochs=1", "1 problem",
     "max_steps=1 and epochs=1 (command line): a run has only one length; keep one"),
    ("pretrain", "max_steps=0 epochs=0", "set the length with one of"),
    ("pretrain", "c.yaml", "3 problems", "max_steps=3 and max_tokens=99 (c.yaml:1, c.yaml:2): a",
     "optim.muon_rl (c.yaml:4): unknown key; did you mean optim.muon_lr?",
     "sead (c.yaml:5): unknown key; did you mean seed?"),
    *((stage, f"configs/{file} seed=x", f"configs/{file} contains settings for {script}",
       f"configs/tiny_{stage}.yaml") for stage, file, script in (
        ("pretrain", "tiny_sft.yaml", "sft_train.py"), ("pretrain", "dpo.yaml", "dpo_train.py"),
        ("sft", "pretrain_6m.yaml", "train.py"))),
    ("pretrain", "broken.yaml seed=x", "2 problems", "broken.yaml:3: not valid YAML", "seed=x"),
    ("pretrain", "none.yaml", "none.yaml: cannot read the config file"),
    ("pretrain", "data.files=none.jsonl", "none.jsonl does not exist", "data.files"),
    ("pretrain", "data.val_files=none.jsonl", "none.jsonl does not exist"),
    ("pretrain", "data.files=cut.jsonl", "cut.jsonl, line 2: not JSON", "one complete JSON object"),
    ("pretrain", "data.files=empty.jsonl", "empty.jsonl is empty", '{"text": "..."}'),
    ("sft", "data.files=empty.jsonl", "empty.jsonl is empty", '"conversations"'),
    ("pretrain", "data.files=no_text.jsonl", "no_text.jsonl, line 4: not pretrain data", "body"),
    ("sft", "data.files=no_turns.jsonl", "no_turns.jsonl, line 4: not sft data", "talk"),
    ("dpo", "data.files=no_rejected.jsonl", "no_rejected.jsonl, line 4: not dpo data", "chosen"),
    ("dpo", "data.files=prompts.jsonl", "prompts.jsonl, line 4: ", "different prompts"),
    ("sft", "data.files=all_long.jsonl data.too_long=drop", "all_long.jsonl: none of",
     "64 positions", "Increase sequence_length"),
    *((stage, "init_from=nowhere", "init_from=nowhere: no model found", "config.json")
      for stage in STAGES),
    *((stage, "init_from=run", "init_from=run: no model", "Did you mean init_from=run/final?")
      for stage in STAGES),
    *((stage, "init_from=llama", "config.json: architecture LlamaForCausalLM, but only Qwen3")
      for stage in STAGES),
    *((stage, "init_from=small", "small/config.json: vocab_size=100, but the tokenizer has 6400")
      for stage in STAGES),
    ("sft", "init_from=wide", "wide does not match its config.json", "has shape (48, 32)"),
    ("pretrain", "model.vocab_size=100", "model.vocab_size=100, but the tokenizer has 6400 entries",
     "set model.vocab_size=6400"),
    ("pretrain", "init_from=wide", "init_from=wide: these settings differ from the model's config",
     "model.hidden_size=32 (command line), 64 in the model", "Remove these keys"),
    ("pretrain", "tokenizer=nowhere", "nowhere/tokenizer.json does not exist"),
    ("pretrain", "tokenizer=bad_tokenizer", "bad_tokenizer/tokenizer.json has no \"model\""),
    ("pretrain", "tokenizer=base init_from=base seed=x", "2 problems", "seed=x (command line)",
     "tokenizer=base and init_from=base: the model in init_from has its own tokenizer; keep one"),
    ("pretrain", "data.val_fraction=2", "data.val_fraction=2.0 must be above 0 and below 1"),
    ("pretrain", "data.val_fraction=x", "(command line): expected a number or auto"),
    ("sft", "data.val_max_rows=-1", "data.val_max_rows=-1 must be"),
    ("pretrain", "deadline=23:30", "deadline=23:30 (command line): unknown key; --help lists all"),
    ("pretrain", "model.max_position_embeddings=63",
     "model.max_position_embeddings=63, but sequence_length=64: set at most 63"),
    *((stage, "init_from=base sequence_length=2049 tokens_per_step=8192",
       "base/config.json: max_position_embeddings=2048, but sequence_length=2049: set at most")
      for stage in STAGES),
    ("pretrain", "ranks=-1 max_hours=-2", "3 problems", "max_steps=2 and max_hours=-2.0",
     "ranks=-1 must be at least 0", "max_hours=-2.0 must be at least 0"),
    ("pretrain", "resume=base", "resume=base is not a step folder"),
    *(("pretrain", f"out_dir={name} resume={resume}", f"out_dir={name} cannot be used ({reason})")
      for name, reason in (("c.yaml", "c.yaml is a file"), ("c.yaml/a/b", "c.yaml is a file"),
                           ("/proc/none", "No such file or directory"))
      for resume in ("auto", "never")),
    ("pretrain", "out_dir=base", "base contains files that are not from a run", "out_dir=NEW"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]}")
def test_invalid_commands_are_reported_and_write_nothing(case, run, workdir, tmp_path):
    stage, settings, *texts = case
    before = contents(workdir)
    code, out = run(stage, *settings.split())
    assert code == 1 and "error: " in out
    for text in texts:
        assert text in out
    assert contents(workdir) == before and not (workdir / "out").exists()
    assert not list(tmp_path.glob("cache/tokens/.making-*"))
    if "problem" in out:  # The message has one line per counted problem.
        message = out[out.index("error: ") :].splitlines()
        assert len(message) == 1 + int(message[0].split()[1])


def test_a_finished_or_different_run_is_not_changed(run, workdir, tmp_path):
    other = tmp_path / "done"
    assert run("pretrain", f"out_dir={other}")[0] == 0
    before = contents(tmp_path / "done"), contents(workdir)
    code, out = run("pretrain", f"out_dir={other}", "log_every_steps=1")
    assert code == 0 and f"already finished: {other}/final (set resume=never or" in out
    assert (contents(tmp_path / "done"), contents(workdir)) == before
    code, out = run("pretrain", f"out_dir={other}", "optim.muon_lr=0.5")
    assert code == 1 and f"{other} holds a finished run with another recipe:" in out
    assert "optim.muon_lr: 0.02 before, 0.5 now" in out
    for option in ("out_dir=NEW", "resume=never", f"init_from={other}/final"):
        assert option in out
    (other / "final").rename(tmp_path / "final")
    for settings, message in (
        (["optim.muon_lr=0.5"], "optim.muon_lr: 0.02 before, 0.5 now"),
        (["data.files=no_turns.jsonl"], "line 1: not pretrain data"),
        (["data.val_files=pretrain.jsonl"], "the data files or the tokenizer have changed"),
    ):
        code, out = run("pretrain", f"out_dir={other}", *settings)
        assert code == 1 and message in out
    (tmp_path / "final").rename(other / "final")
    assert (contents(tmp_path / "done"), contents(workdir)) == before


def test_a_finished_run_is_refused_if_its_base_model_was_trained_again(run, tmp_path):
    base, words = tmp_path / "base", (f"out_dir={tmp_path}/run", f"init_from={tmp_path}/base/final")
    assert run("pretrain", f"out_dir={base}")[0] == 0
    assert run("pretrain", *words)[0] == 0
    weights = base / "final/model.safetensors"
    os.utime(weights)  # As after a copy: newer, but the same.
    code, out = run("pretrain", *words)
    assert code == 0 and "already finished" in out
    weights.write_bytes((tmp_path / "run/final/model.safetensors").read_bytes())
    code, out = run("pretrain", *words)
    assert code == 1 and "holds a finished run with another recipe:" in out
    assert "the model in init_from has changed" in out


def test_only_runs_are_moved_aside(run, workdir, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (data / "mine.jsonl").write_text("{}\n")
    before = contents(tmp_path)
    for resume in ("auto", "never"):
        code, out = run("pretrain", f"out_dir={data}", f"resume={resume}")
        assert code == 1 and f"{data} contains files that are not from a run" in out
        assert "out_dir=NEW" in out and "resume=never" not in out and "init_from" not in out
    assert contents(data)["mine.jsonl"] == before["data/mine.jsonl"]
    assert not Path(f"{data}.1").exists()
    (tmp_path / "empty").mkdir()
    assert run("pretrain", f"out_dir={tmp_path}/empty", "resume=never")[0] == 0
    monkeypatch.chdir(tmp_path / "empty")  # The system cannot rename this folder.
    words = [f"data.files={workdir}/pretrain.jsonl", "out_dir=.", "resume=never", *MODEL]
    code, out = run("pretrain", *words, f"{workdir}/configs/tiny_pretrain.yaml")
    assert code == 1 and "resume=never: . cannot be moved" in out


def test_the_options_suggested_for_an_unfinished_run_work(run, workdir, tmp_path):
    out_dir, step = tmp_path / "stopped", tmp_path / "stopped/step_000002"
    assert run("pretrain", f"out_dir={out_dir}")[0] == 0
    (out_dir / "final").rename(tmp_path / "final")
    for setting, sources in (
        ("optim.muon_lr=0.5", ("resume", "init_from")),
        ("optim.name=adamw", ("init_from",)),
        ("model.intermediate_size=64", ()),
    ):
        code, out = run("pretrain", f"out_dir={out_dir}", setting)
        assert code == 1 and "unfinished run with another recipe" in out
        options = out[out.index("Options:") :].splitlines()[1:]
        names = ["out_dir=NEW", "resume=never", *(f"{key}={step}" for key in sources)]
        assert [option.split()[0] for option in options] == names
        assert len({len(re.match(r" +\S+ +", o)[0]) for o in options}) == 1  # Aligned.
    assert run("pretrain", f"out_dir={out_dir}", "optim.muon_lr=0.5", f"resume={step}")[0] == 0
    words = (f"out_dir={tmp_path}/new", "optim.name=adamw", f"init_from={step}")
    assert run("pretrain", *words)[0] == 0


def test_a_run_from_another_stage_is_rejected(run, tmp_path):
    """This includes resume=PATH. An older run, which has no stage, is compared by its recipe."""
    folder, step = tmp_path / "run", tmp_path / "run/step_000002"
    assert run("pretrain", f"out_dir={folder}")[0] == 0
    identity = json.loads((folder / "identity.json").read_text())
    assert identity["stage"] == "pretrain"
    before = contents(folder)
    code, out = run("sft", f"out_dir={folder}")
    assert code == 1 and f"{folder} holds a run of the pretrain stage, but this is sft" in out
    assert f"init_from={folder}/final" in out
    for out_dir in (folder, tmp_path / "new"):
        code, out = run("sft", f"out_dir={out_dir}", f"resume={step}")
        assert code == 1 and f"{step} is from a run of the pretrain stage, but this is sft" in out
    assert contents(folder) == before
    (folder / "final").rename(tmp_path / "final")
    code, out = run("sft", f"out_dir={folder}")
    assert code == 1 and "holds a run of the pretrain stage" in out and "init_from=" not in out
    del identity["stage"], identity["digest"]
    (folder / "identity.json").write_text(json.dumps(identity))
    code, out = run("sft", f"out_dir={folder}")
    assert code == 1 and "unfinished run with another recipe" in out
    code, out = run("pretrain", f"out_dir={folder}")
    assert code == 0 and "resuming from" in out


def test_a_run_resumes_with_touched_but_not_with_changed_data(run, workdir, tmp_path):
    data = tmp_path / "mine.jsonl"
    words = (f"out_dir={tmp_path}/run", f"data.files={data}")
    shutil.copy(workdir / "pretrain.jsonl", data)
    assert run("pretrain", *words)[0] == 0
    (tmp_path / "run/final").rename(tmp_path / "final")
    os.utime(data, (1, 1))
    code, out = run("pretrain", *words)
    assert code == 0 and "resuming from" in out
    shutil.rmtree(tmp_path / "run/final")
    data.write_text(data.read_text().replace("row 7 goes", "row 7 went"))
    code, out = run("pretrain", *words)
    assert code == 1 and "the data files or the tokenizer have changed" in out


def test_pretraining_from_a_model_uses_its_dimensions(run, workdir, tmp_path):
    words = ("init_from=base", f"out_dir={tmp_path}/more")
    assert run("pretrain", *words)[0] == 0  # The same dimensions may be set again.
    text = (tmp_path / "more/run.yaml").read_text()
    assert "vocab_size: 6400  # from init_from" in text
    (tmp_path / "more/final").rename(tmp_path / "final")
    assert run("pretrain", f"{tmp_path}/more/run.yaml", *words)[0] == 0


@pytest.mark.parametrize("recipe", ["", "tiny_"])
def test_the_next_command_uses_the_same_recipe(recipe, run, tmp_path):
    for stage, following in (("pretrain", "sft"), ("sft", "dpo")):
        code, out = run(stage, f"configs/{recipe}{stage}.yaml", f"out_dir={tmp_path}/{stage}")
        file = f"configs/tiny_{following}.yaml " if recipe else ""
        command = f"python {following}_train.py {file}init_from={tmp_path}/{stage}/final"
        assert code == 0 and f"next: {command}" in out.splitlines()


@pytest.mark.parametrize(("stage", "settings", "message"), [
    ("sft", [], "64 positions were truncated: long_sft 1"),
    ("sft", ["data.too_long=drop"], "64 positions were dropped: long_sft 1"),
    ("dpo", [], "128 positions were dropped: long_dpo 1"),
])  # fmt: skip
def test_rows_longer_than_a_row_are_counted(stage, settings, message, run, workdir):
    code, out = run(stage, f"data.files=long_{stage}.jsonl", *settings, "--prepare-only")
    assert code == 0 and not (workdir / "out").exists()
    assert f"1 rows longer than {message} (" in out
    assert ("data.too_long" in out) == (stage == "sft")


def test_a_document_longer_than_a_row_is_split_and_kept(run, workdir, tokenizer):
    text = "word " * 500
    (workdir / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    settings = ["data.files=long.jsonl", "data.val_files=pretrain.jsonl", "--prepare-only"]
    code, out = run("pretrain", *settings)
    (workdir / "long.jsonl").unlink()
    assert code == 0 and "dropped" not in out
    assert f"train: {-(-(len(tokenizer.encode(text)) + 1) // 64)} pieces of documents" in out


@pytest.mark.parametrize("name", ["/elsewhere/a.jsonl", "link.jsonl"])
def test_in_a_container_the_missing_file_error_explains_the_mount(name, elsewhere, monkeypatch):
    Path("link.jsonl").symlink_to("/elsewhere/a.jsonl")
    monkeypatch.setenv("GPU_PROFILE", "cpu")  # docker-compose.yml sets it.
    tokenizer = Tokenizer(default_folder())
    with pytest.raises(UserError) as error:
        build_cache(Path(name), "pretrain", tokenizer)
    assert "DATASET_DIR=/elsewhere" in str(error.value)
    assert "use the path dataset/a.jsonl" in str(error.value)
    with pytest.raises(UserError) as error:
        build_cache(Path("none.jsonl"), "pretrain", tokenizer)
    assert "DATASET_DIR" not in str(error.value)


def test_an_unquoted_list_and_a_bare_learning_rate_get_a_hint(run, workdir):
    code, out = run("pretrain", "data.files=[a,", "b]", "--lr=1")
    assert code == 1 and 'quote it, such as "data.files=[a, b]"' in out
    assert "the learning rates are optim.muon_lr, optim.adamw_lr, optim.embedding_lr" in out
