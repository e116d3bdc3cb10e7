"""Tests that round trips through transformers preserve models, and that errors are clear."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import model as model_module
from model import AttentionOp, ModelConfig, Transformer, count_parameters
from tokenizer.bpe import SPECIAL_TOKENS
from tokenizer.chat_format import render_conversation, render_prompt
from train import PretrainConfig
from trainlib.core import settings as settings_of
from trainlib.core.errors import UserError
from trainlib.models import hf_folder
from trainlib.models.hf_folder import (
    adopt_model_config,
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    model_files,
    num_parameters,
    weights_digest,
)


def write_folder(path: Path, tokenizer, **changes) -> Transformer:
    """Write a model with random weights, including norms, in the layout of a checkpoint."""
    sizes = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**sizes, **changes}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    for name, content in model_files(model.config, tokenizer).items():
        (path / name).write_text(content, encoding="utf-8")
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return model


def edit(path: Path, **changes) -> None:
    """Change keys in a JSON file; None removes a key."""
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(values), encoding="utf-8")


def test_the_stored_logits_are_those_of_transformers():
    values = {**asdict(hf_folder.PROBE), "attn_implementation": "eager"}
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values)).eval()
    for i, name in enumerate(dict(Transformer(hf_folder.PROBE).named_parameters())):
        weight = theirs.get_parameter(name)
        values = torch.arange(weight.numel()).add(i).mul(0.7).sin()
        weight.data.copy_(values.add("norm" in name).view(weight.shape))
    theirs.tie_weights()
    with torch.no_grad():
        logits = theirs(torch.arange(12).view(1, -1)).logits[0, -1, :8]
    assert torch.allclose(logits, torch.tensor(hf_folder.PROBE_LOGITS), rtol=1e-4, atol=2e-6)
    assert hf_folder.architecture() == "Qwen3ForCausalLM"


@pytest.mark.parametrize("op", ["rms_norm", "rotate", "swiglu", "attention"])
def test_a_decoder_with_other_formulas_has_another_name(tmp_path, tokenizer, op, monkeypatch):
    """Replacing a function in ops has the effect of an edit in model.py."""
    plain = getattr(model_module.ops, op)
    edited = {
        "rms_norm": lambda x, weight, eps: plain(x, 1 + weight, eps),
        "rotate": lambda x, cos, sin: x,
        "swiglu": lambda gate, up, down: plain(gate.abs(), up, down),
        "attention": AttentionOp(plain.prepare, lambda *x: 1.01 * plain.attend(*x))
        if op == "attention"
        else None,
    }
    monkeypatch.setattr(model_module.ops, op, edited[op])
    monkeypatch.setattr(
        hf_folder, "architecture", functools.cache(hf_folder.architecture.__wrapped__)
    )
    model = write_folder(tmp_path, tokenizer)
    names = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["architectures"]
    assert names == ["CustomForCausalLM"]
    with pytest.raises(ValueError, match="custom"):  # Not computed as something that it is not.
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = dict(load_model(tmp_path).named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in model.named_parameters())
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"trained with an edited model\.py"):
        load_model(tmp_path)


def test_the_number_of_parameters_is_known_before_the_model_is_built(tmp_path, tokenizer):
    for tied in (True, False):
        model = write_folder(tmp_path, tokenizer, tie_word_embeddings=tied)
        assert num_parameters(model.config) == count_parameters(model)
        assert load_config(tmp_path) == model.config
    for sizes, message in (
        ({"num_hidden_layers": 10**6}, r"1,000,000 layers; the limit is 1,000\."),
        ({"intermediate_size": 10**9}, r"[\d,]+ parameters; the limit is 10,000,000,000"),
    ):
        write_folder(tmp_path, tokenizer)
        edit(tmp_path / "config.json", **sizes)
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)


def test_a_config_over_the_limit_is_refused_by_its_size(tmp_path, tokenizer):
    write_folder(tmp_path, tokenizer)
    for content, message in ((" " * (1 << 20), r"bytes; the limit is 1,048,576"),
                             ("", "cannot be read")):  # fmt: skip
        path = tmp_path / "config.json"
        path.write_text(content + '{"a":' * 100_000)
        with pytest.raises(UserError, match=message):
            load_config(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pipe_in_a_model_folder_is_an_error(name, tmp_path, tokenizer):
    write_folder(tmp_path, tokenizer)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)  # Opening it would wait for ever.
    loads = [load_model, weights_digest] if name == "model.safetensors" else [load_tokenizer]
    for load in loads:
        with pytest.raises(UserError, match=f"{name} (is not a regular file|does not exist)"):
            load(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_round_trip_through_transformers_preserves_the_model(tmp_path, tokenizer, tied, shard):
    original = write_folder(tmp_path, tokenizer, tie_word_embeddings=tied, rope_theta=5e5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "back", max_shard_size=shard)
    if shard == "20KB":
        assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    ours = load_model(tmp_path / "back")
    assert ours.config == original.config
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


def test_bfloat16_weights_become_fp32(tmp_path, tokenizer):
    write_folder(tmp_path, tokenizer)
    weights = tmp_path / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(weights).items()}, weights)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}


def test_generation_config_has_the_stop_ids_that_chat_uses(tmp_path, tokenizer):
    write_folder(tmp_path, tokenizer)
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == [2, 0] == list(tokenizer.stop_ids)
    assert config.pad_token_id == 0


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("tokenizer")
    for name, content in model_files(ModelConfig(), tokenizer).items():
        (path / name).write_text(content, encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(path)


def assert_equal_ids_and_mask(theirs, tokenizer, ours, messages, **options):
    """Compare with transformers, whose mask holds what the template marks."""
    found = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    expected = render_conversation(tokenizer, ours)
    assert found["input_ids"] == expected.ids.tolist()
    assert found["assistant_masks"] == list(expected.mask)


content = st.text(max_size=24).filter(lambda text: not any(s in text for s in SPECIAL_TOKENS))


@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(user=content, answer=content)
def test_template_equals_renderer_for_any_plain_content(theirs, tokenizer, user, answer):
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    assert_equal_ids_and_mask(theirs, tokenizer, messages, messages)


@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(answer=content, reasoning=st.sampled_from(["", "why"]), weight=st.sampled_from([1, None]))
def test_thinking_off_renders_as_in_transformers(theirs, tokenizer, answer, reasoning, weight):
    messages = [
        {"role": "user", "content": "q", "enable_thinking": False},
        {"role": "assistant", "content": answer, "enable_thinking": False},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": answer, "enable_thinking": False,
         "reasoning_content": reasoning},
        {"role": "assistant", "content": answer, "enable_thinking": weight},
    ]  # fmt: skip
    assert_equal_ids_and_mask(theirs, tokenizer, messages, messages)
    for options in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        found = theirs.apply_chat_template(messages[:3], add_generation_prompt=True, **options)
        assert found["input_ids"] == render_prompt(tokenizer, messages[:3], **options)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(texts=st.lists(content, min_size=7, max_size=7), system=st.booleans())
def test_reasoning_and_tools_render_as_in_transformers(theirs, tokenizer, texts, system):
    """Tools, reasoning, calls and tool answers give the same ids for any content."""
    one, two, three, four, five, six, seven = texts
    tools = [{"name": one, "parameters": {two: 1, "é": [None, 2.5]}}, {"name": "g"}]
    messages = [
        {"role": "user", "content": three},
        {"role": "assistant", "content": four, "reasoning_content": five or "x", "tool_calls": [
            {"name": one, "arguments": {two: six}}, {"name": "g", "arguments": "{}"}]},
        {"role": "tool", "content": seven},
        {"role": "assistant", "content": two, "reasoning_content": ""},
    ]  # fmt: skip
    ours = [{"role": "system", "content": six, "tools": tools}, *messages]
    if system:
        messages = [{"role": "system", "content": six}, *messages]
    else:
        ours[0]["content"] = ""
    assert_equal_ids_and_mask(theirs, tokenizer, ours, messages, tools=tools)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tokenizer):
    for size in (6400, 6464):
        check_vocabulary(ModelConfig(vocab_size=size), tokenizer, "key", "fix")
    with pytest.raises(UserError, match=r"key=6144.*6400 entries; fix"):
        check_vocabulary(ModelConfig(vocab_size=6144), tokenizer, "key", "fix")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True}, "sliding"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": "24"}, "hidden_size"),
        ({"hidden_size": 0, "head_dim": 7}, "hidden_size=0 must be above 0; model.head_dim=7 must"),
    ],
)
def test_unsupported_configs_are_refused_by_name(tmp_path, tokenizer, changes, message):
    write_folder(tmp_path, tokenizer)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path)


def test_tie_word_embeddings_has_the_same_default_as_in_transformers(tmp_path, tokenizer):
    write_folder(tmp_path, tokenizer)
    edit(tmp_path / "config.json", tie_word_embeddings=None)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert load_config(tmp_path).tie_word_embeddings == theirs.tie_word_embeddings


def test_broken_json_is_a_user_error(tmp_path, tokenizer):
    write_folder(tmp_path, tokenizer)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize("case", ["missing", "unexpected", "shape", "corrupt", "integers"])
def test_mismatched_weights_are_refused_by_name(tmp_path, tokenizer, case):
    write_folder(tmp_path, tokenizer)
    path, name = tmp_path / "model.safetensors", "model.norm.weight"
    tensors = load_file(path)
    if case == "missing":
        del tensors[name]
    elif case == "unexpected":
        name = "model.norm.bias"
        tensors[name] = torch.zeros(24)
    elif case == "shape":
        tensors[name] = torch.zeros(25)
    elif case == "integers":
        tensors[name] = torch.ones(24, dtype=torch.int8)
    save_file(tensors, path)
    if case == "corrupt":
        path.write_bytes(path.read_bytes()[:200])
        name = "model.safetensors"
    with pytest.raises(UserError, match=name):
        load_model(tmp_path)


def test_tied_head_is_accepted_only_if_equal(tmp_path, tokenizer):
    write_folder(tmp_path, tokenizer)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    load_model(tmp_path)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load_model(tmp_path)


def test_index_cannot_point_outside_the_folder(tmp_path, tokenizer):
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(folder, tokenizer)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside"):
        load_model(folder)


def test_loading_draws_no_random_numbers(tmp_path, tokenizer):
    write_folder(tmp_path, tokenizer)
    state = torch.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(state, torch.get_rng_state())


def test_loading_does_not_import_torchs_compiler(tmp_path, tokenizer):
    write_folder(tmp_path, tokenizer)
    code = (
        "import sys; from trainlib.models.hf_folder import load_model; "
        f"load_model({str(tmp_path)!r}); print('torch._dynamo' in sys.modules)"
    )
    proc = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert proc.stdout == "False\n"


def test_the_checkpoint_config_overrides_a_config_file(tmp_path, tokenizer, caplog):
    write_folder(tmp_path, tokenizer)
    args = ["configs/tiny_pretrain.yaml", f"init_from={tmp_path}"]
    config = adopt_model_config(settings_of.load_config(PretrainConfig, args, None))
    assert config.model == load_config(tmp_path)
    texts = [r.message for r in caplog.records if "differ from the model's config" in r.message]
    assert len(texts) == 1 and "model.hidden_size=192 (configs/tiny_pretrain.yaml:" in texts[0]
    config = settings_of.load_config(PretrainConfig, [*args, "model.head_dim=32"], None)
    with pytest.raises(UserError, match=r"model\.head_dim=32 \(command line\), 16 in the model"):
        adopt_model_config(config)


def test_a_git_lfs_pointer_or_an_html_page_in_a_model_folder_is_named(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(UserError, match="config.json is an HTML page"):
        load_model(tmp_path)
    for name, text in model_files(ModelConfig(vocab_size=6400), tokenizer).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match="model.safetensors is a git-lfs pointer"):
        load_model(tmp_path)
