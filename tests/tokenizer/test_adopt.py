"""Tests that adopted tokenizers are lossless, usable for training, and saved with the model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer as Bpe
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenizer.adopt import adopt
from tokenizer.bpe import REQUIRED_TOKENS, Tokenizer, default_folder
from tokenizer.chat_format import render_conversation
from tools.train_tokenizer import main as train_tokenizer

TEXTS = ["Hello world, this is a text. 你好，世界 第一条 12345", "the cat sat\nand é Ж"] * 20


def learn(bpe: Bpe, trainer: type = trainers.BpeTrainer, **kwargs) -> None:
    bpe.train_from_iterator(TEXTS, trainer(vocab_size=500, show_progress=False, **kwargs))


def gpt2_like() -> Bpe:
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn(bpe, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.enable_padding()
    return bpe


def llama_like(metaspace: bool = False, byte_fallback: bool = True) -> Bpe:
    """Return a SentencePiece BPE as converted by older (Prepend) or newer (Metaspace) releases."""
    bpe = Bpe(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    codes = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    learn(bpe, special_tokens=special + codes)
    values = json.loads(bpe.to_str())
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] in special]
    bpe = Bpe.from_str(json.dumps({**values, "pre_tokenizer": None}))
    if metaspace:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        bpe.normalizer = normalizers.Sequence(steps)  # type: ignore[arg-type]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])  # type: ignore
    bpe.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    bpe.enable_truncation(5)
    return bpe


def bert_like() -> Bpe:
    bpe = Bpe(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    bpe.normalizer = normalizers.BertNormalizer()
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bpe.decoder = decoders.WordPiece()
    learn(bpe, trainers.WordPieceTrainer, special_tokens=["[UNK]"])
    return bpe


def saved(bpe: Bpe, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    return folder


USABLE = {
    "gpt2": gpt2_like,
    "llama": llama_like,
    "mistral": lambda: llama_like(metaspace=True),
}
PLAIN = ("Hello world", " x  y ", "\n\n a\tb\r\n", "a 😀 ﷺ \x00\x01 ", "<0x41> 中", "Ж" * 40)


@pytest.mark.parametrize("name", USABLE)
def test_texts_round_trip_and_pieces_concatenate(name, tmp_path):
    theirs = USABLE[name]()
    ours = adopt(saved(theirs, tmp_path))
    for token, id_ in theirs.get_vocab().items():
        assert ours._bpe.token_to_id(token) == id_  # No id has changed.
    added = [token for token in REQUIRED_TOKENS if theirs.token_to_id(token) is None]
    assert ours.vocab_size == theirs.get_vocab_size() + len(added) and len(added) >= 2
    for text in (*PLAIN, "".join(REQUIRED_TOKENS) + "<s></s>"):
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert not ours.special_ids & set(ids), "text must not produce special ids"
        assert sum(len(ours.id_to_bytes[i]) for i in ids) == len(text.encode())
    assert ours.encode("one") + ours.encode(" two") == ours.encode("one two")


@pytest.mark.parametrize("name", USABLE)
def test_transformers_produces_the_same_ids_from_the_model_folder(name, tmp_path):
    ours = adopt(saved(USABLE[name](), tmp_path / "theirs"))
    folder = tmp_path / "ours"
    folder.mkdir()
    for name, content in ours.files(512).items():
        (folder / name).write_text(content, encoding="utf-8")
    reloaded = adopt(folder)
    assert reloaded.json == ours.json and reloaded.fingerprint == ours.fingerprint
    assert Tokenizer(folder).encode("a b") == ours.encode("a b")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    for text in PLAIN:
        assert loaded(text)["input_ids"] == ours.encode(text)
        assert loaded.decode(ours.encode(text)) == text
    call = {"name": "add", "arguments": {"a": 1}}
    messages = [
        {"role": "user", "content": "Hello 世界"},
        {"role": "assistant", "content": "\nthe cat", "reasoning_content": "why?"},
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "\n\nthe cat"},
    ]
    ids = loaded.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == render_conversation(ours, messages).ids.tolist()


def test_the_default_tokenizer_is_adopted_unchanged(tokenizer):
    assert adopt(default_folder()).json == tokenizer.json


@pytest.mark.parametrize("build", [bert_like, lambda: llama_like(byte_fallback=False)])
def test_lossy_tokenizers_are_refused(build, tmp_path):
    with pytest.raises(ValueError, match=r"\.json is not lossless.*byte fallback"):
        adopt(saved(build(), tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[1]", "has no"), ('{"model": {"type": "New"}}', "cannot load")],
)
def test_a_broken_file_is_reported(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    for read in (adopt, Tokenizer):
        with pytest.raises(ValueError, match=rf"tokenizer\.json.*{message}"):
            read(tmp_path)


def test_loading_a_tokenizer_without_the_special_tokens_is_refused(tmp_path):
    folder = saved(gpt2_like(), tmp_path)
    with pytest.raises(ValueError, match="train.py tokenizer=.* adds it"):
        Tokenizer(folder)


# ---- training with another tokenizer -------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder with random words as data and a 32,000-entry tokenizer trained on them."""
    path = tmp_path_factory.mktemp("workspace")
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghij", k=7)) for _ in range(24_000)]
    texts = [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (path / "a.jsonl").write_text("".join(rows))
    talks = [
        [{"role": "user", "content": word}, {"role": "assistant", "content": word}]
        for word in words[:20]
    ]
    rows = [json.dumps({"conversations": talk}) + "\n" for talk in talks]
    (path / "talks.jsonl").write_text("".join(rows))
    (path / "empty.yaml").write_text("")
    data = [str(path / "a.jsonl")] * 2  # Twice, so that every pair occurs often enough.
    command = ["--data", *data, "--vocab-size", "32000", "--out", str(path / "tok")]
    assert train_tokenizer(command) == 0
    return path


COMMON = ["tokens_per_step=128", "sequence_length=64", "max_steps=2", "device=cpu"]
COMMON += ["micro_batch_size=2", "eval_every_steps=0", "data.val_max_rows=2"]
MODEL = ["model.hidden_size=16", "model.intermediate_size=16", "model.num_hidden_layers=1"]
MODEL += ["model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=8"]
PRETRAIN = ["data.files=a.jsonl", "tokenizer=tok", *MODEL]


@pytest.fixture
def run(workspace, monkeypatch, run_stage):
    """Return a function that runs a stage in the workspace and returns its exit code."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("TRAIN_LLM_CACHE_DIR", str(workspace / "cache"))
    return lambda stage, *settings: run_stage(stage, "empty.yaml", *COMMON, *settings)


def test_training_works_with_a_vocabulary_of_32000(workspace, run, capsys):
    assert run("pretrain", *PRETRAIN, "out_dir=run") == 0
    assert "vocabulary size 32,000" in capsys.readouterr().out
    assert (workspace / "run/final/tokenizer.json").read_bytes() == (
        workspace / "tok/tokenizer.json"
    ).read_bytes()
    text = (workspace / "run/run.yaml").read_text()
    assert "tokenizer: tok  # command line" in text
    assert "vocab_size: 32000  # from the tokenizer" in text
    model = transformers.AutoModelForCausalLM.from_pretrained(workspace / "run/final")
    loaded = transformers.AutoTokenizer.from_pretrained(workspace / "run/final")
    assert model.config.vocab_size == len(loaded) == model.get_input_embeddings().num_embeddings
    assert len(loaded) == 32_000
    settings = ["init_from=run/final", "data.files=talks.jsonl", "out_dir=sft"]
    assert run("sft", *settings) == 0
    expected = Tokenizer(workspace / "tok").fingerprint
    assert Tokenizer(workspace / "sft/final").fingerprint == expected


def test_a_run_resumes_only_with_its_own_tokenizer(workspace, run, capsys):
    saved(gpt2_like(), workspace / "one")
    saved(llama_like(), workspace / "two")
    settings = ["data.files=a.jsonl", *MODEL, "tokenizer=one", "model.vocab_size=600"]
    assert run("pretrain", *settings, "out_dir=other", "max_steps=1") == 0
    (workspace / "other/final").rename(workspace / "gone")
    assert run("pretrain", *settings, "out_dir=other", "max_steps=1", "tokenizer=two") == 1
    assert "tokenizer: 'one' before, 'two' now" in capsys.readouterr().err
    saved(llama_like(), workspace / "one")  # Same path, different content.
    assert run("pretrain", *settings, "out_dir=other", "max_steps=1") == 1
    assert "the data files or the tokenizer have changed" in capsys.readouterr().err
    assert run("pretrain", *settings, "model.vocab_size=300", "out_dir=new") == 1
    assert "model.vocab_size=300, but the tokenizer has" in capsys.readouterr().err
    assert not (workspace / "new").exists()
