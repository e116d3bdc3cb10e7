"""Tests for the chat: the history fits in the context, and an error ends only its turn."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpo_train import DPOConfig
from model import ModelConfig, Transformer
from sft_train import SFTConfig
from tokenizer.chat_format import render_conversation, render_prompt
from tools import chat
from train import PretrainConfig
from trainlib.core.settings import run_yaml
from trainlib.models.generate import Sampling
from trainlib.models.hf_folder import model_files

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SIZES))


def save(folder, model, tokenizer):
    for name, content in model_files(model.config, tokenizer).items():
        (folder / name).write_text(content, encoding="utf-8")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def talk(monkeypatch, model, tokenizer, lines, system=(), raw=False):
    """Run a conversation; return the length of each prompt passed to the model."""
    questions, lengths, generate = iter([*lines, "/quit"]), [], chat.generate

    def spy(model, ids, *rest):
        lengths.append(len(ids))
        return generate(model, ids, *rest)

    monkeypatch.setattr(builtins, "input", lambda *_: next(questions))
    monkeypatch.setattr(chat, "generate", spy)
    chat.converse(model, tokenizer, list(system), Sampling(temperature=0, max_new_tokens=12), raw)
    return lengths


def test_the_oldest_exchanges_are_removed_to_fit_an_answer(monkeypatch, capsys, model, tokenizer):
    system = [{"role": "system", "content": "be kind"}]
    lengths = talk(monkeypatch, model, tokenizer, ["hello there"] * 8, system)
    assert len(lengths) == 8 and max(lengths) > lengths[0]
    assert max(lengths) <= 64 - 12
    # Each exchange is removed, and reported, once.
    assert 1 <= capsys.readouterr().err.count("oldest exchange") <= 7


def test_new_clears_the_history(monkeypatch, model, tokenizer):
    lengths = talk(monkeypatch, model, tokenizer, ["hello", "hello", "/new", "hello"])
    assert lengths[1] > lengths[0] == lengths[2]


def test_a_question_that_is_too_long_ends_only_its_turn(monkeypatch, capsys, model, tokenizer):
    assert len(talk(monkeypatch, model, tokenizer, ["word " * 100, "hi"])) == 1
    assert "at most 63" in capsys.readouterr().err


def test_an_interrupted_answer_is_kept(monkeypatch, capsys, model, tokenizer):
    def interrupted(*_):
        yield from tokenizer.encode("the answer so far")
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "generate", interrupted)
    messages = [{"role": "user", "content": "hi"}]
    answer = {"role": "assistant", "content": "the answer so far"}
    assert chat.answer(model, tokenizer, messages, Sampling()) == answer


@pytest.mark.parametrize("interrupted", [False, True])
def test_thoughts_are_printed_on_stderr_and_kept(
    monkeypatch, capsys, model, tokenizer, interrupted
):
    question = {"role": "user", "content": "6+7"}
    thoughts = {"role": "assistant", "content": "" if interrupted else "13", 
                "reasoning_content": "6+7\n=13"}  # fmt: skip
    prompt = render_prompt(tokenizer, [question])
    ids = render_conversation(tokenizer, [question, thoughts]).ids.tolist()

    def thinking(_, ids_, *rest):
        assert ids_ == prompt
        yield from ids[len(prompt) : ids.index(tokenizer.tag_id("</think>")) + 1]
        if interrupted:
            raise KeyboardInterrupt
        yield from ids[ids.index(tokenizer.tag_id("</think>")) + 1 : -1]

    monkeypatch.setattr(chat, "generate", thinking)
    assert chat.answer(model, tokenizer, [question], Sampling()) == thoughts
    assert capsys.readouterr() == (thoughts["content"] + "\n", "6+7\n=13\n")


def test_no_think_gives_the_prompt_and_the_history_empty_thoughts(monkeypatch, model, tokenizer):
    prompts, answers = [], iter(["13", "14"])

    def generate(_, ids, *rest):
        prompts.append(ids)
        yield from [*tokenizer.encode(next(answers)), tokenizer.im_end_id]

    questions = iter(["6+7", "7+7", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda *_: next(questions))
    monkeypatch.setattr(chat, "generate", generate)
    chat.converse(model, tokenizer, [], Sampling(max_new_tokens=9), thinking=False)
    empty = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    first = f"<|im_start|>user\n6+7<|im_end|>\n{empty}"
    second = f"{first}13<|im_end|>\n<|im_start|>user\n7+7<|im_end|>\n{empty}"
    assert [tokenizer.show(ids) for ids in prompts] == [first, second]


def test_raw_lines_are_starts_of_separate_documents(monkeypatch, model, tokenizer):
    prompts, generate = [], chat.generate

    def spy(model, ids, *rest):
        prompts.append(ids)
        return generate(model, ids, *rest)

    monkeypatch.setattr(chat, "generate", spy)
    talk(monkeypatch, model, tokenizer, ["话说 ", "", "/new"], raw=True)
    assert prompts == [[tokenizer.end_of_text_id, *tokenizer.encode(t)] for t in ("话说 ", "/new")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "hi", "--top-p", "2"], "top_p=2.0"),
        (["--prompt", "word " * 100], "at most 63"),
        (["--prompt", "word " * 100, "--raw"], "at most 63"),
        (["--prompt", "hi", "--raw", "--system", "be"], "Remove --system"),
        (["--prompt", "hi", "--raw", "--no-think"], "and --no-think"),
        (["--prompt", "hi", "--temperature", "nan"], "temperature=nan"),
        (["--prompt", "hi", "vocabulary"], "6144"),
    ],
)
def test_errors_exit_with_code_1_and_no_traceback(tmp_path, model, tokenizer, options, words):
    if options[-1] == "vocabulary":
        options, model = options[:-1], Transformer(ModelConfig(**SIZES, vocab_size=6144))
    save(tmp_path, model, tokenizer)
    command = [sys.executable, "chat.py", "--model", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr
    assert not done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["utf-8:surrogateescape", "utf-8:strict", "ascii"])
def test_broken_bytes_are_replaced_and_the_session_continues(tmp_path, model, tokenizer, encoding):
    save(tmp_path, model, tokenizer)
    command = [sys.executable, "chat.py", "--model", str(tmp_path), "--max-new-tokens", "3"]
    command += ["--temperature", "0"]
    options = {"env": {**os.environ, "PYTHONIOENCODING": encoding}, "capture_output": True}
    lines = b"half \xe4\xbd of it\n\xff\nlast\n"
    done = subprocess.run(command, input=lines, **options)
    assert done.returncode == 0 and done.stdout.count(b"> ") == 4, done.stderr
    done = subprocess.run([*map(str.encode, command), b"--prompt", b"a \xff b"], **options)
    assert done.returncode == 0 and not done.stderr


def test_the_default_is_the_newest_run_that_can_answer(elsewhere, capsys, monkeypatch):
    """The stages write the files; the last run is the newest, in any folder."""
    used = []
    monkeypatch.setattr(chat, "load_model", lambda folder, _: used.append(folder))
    monkeypatch.setattr(chat, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(chat, "answer", lambda *_: used.append("answer"))
    monkeypatch.setattr(chat, "continue_text", lambda *_: used.append("raw"))

    def taken(*options):
        monkeypatch.setattr(sys, "argv", ["chat.py", "--prompt", "hi", *options])
        used.clear()
        chat.main()
        assert used[0] in capsys.readouterr().err
        return used

    with pytest.raises(SystemExit):
        taken()
    assert "no finished run in runs/" in capsys.readouterr().err
    runs = [("b/x", PretrainConfig), ("a", PretrainConfig)]
    for seconds, (name, cls) in enumerate([*runs, ("d/e", DPOConfig), ("c", SFTConfig)]):
        final = Path("runs", name, "final")
        final.mkdir(parents=True)
        (final / "run.yaml").write_text(run_yaml(cls()), encoding="utf-8")
        os.utime(final / "run.yaml", (seconds, seconds))
        assert taken() == [str(final), "raw" if cls is PretrainConfig else "answer"]
    os.utime("runs/a/final/run.yaml")
    assert taken("--raw") == ["runs/c/final", "raw"]


def test_every_sampling_option_is_used(monkeypatch):
    """Fails if a command-line option is parsed but not used, or swapped with another."""
    calls = []
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(chat, name, lambda *_: None)
    monkeypatch.setattr(chat, "answer", lambda *args: calls.append(args[2:]))
    command = "chat.py --model m --prompt hi --system be --temperature 0.2 --top-p 0.5 --top-k 3"
    command += " --max-new-tokens 7 --seed 9 --no-think"
    monkeypatch.setattr(sys, "argv", command.split())
    chat.main()
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    sampling = Sampling(temperature=0.2, top_p=0.5, top_k=3, max_new_tokens=7, seed=9)
    assert calls == [(messages, sampling, False)]


def test_the_error_for_a_run_folder_suggests_its_model_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "final").mkdir()
    (tmp_path / "final/config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model", str(tmp_path), "--prompt", "hi"])
    with pytest.raises(SystemExit):
        chat.main()
    message = capsys.readouterr().err
    assert f"error: --model {tmp_path}: no model found" in message
    assert f"Did you mean --model {tmp_path}/final?" in message
