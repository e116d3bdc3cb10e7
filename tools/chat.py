"""Chat with a model, or let it continue texts with --raw; --prompt prints one answer and exits."""

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import codecs
import contextlib
import glob
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, dropwhile, takewhile
from pathlib import Path
from typing import TextIO

from model import Transformer
from tokenizer.bpe import Tokenizer
from tokenizer.chat_format import Message, render_prompt
from trainlib.core.errors import UserError
from trainlib.core.settings import keys
from trainlib.core.terminal import use_replacement_characters, valid_text
from trainlib.models.generate import Sampling, decode, seeded_generator
from trainlib.models.hf_folder import load_model, load_tokenizer


def newest_model() -> tuple[str, bool]:
    """Return the newest final/ in runs/, a tuned one if any, and whether it is only pretrained."""
    found = []
    for settings in map(Path, glob.glob("runs/**/final/run.yaml", recursive=True)):
        # Only pretraining has the section `model`; later stages take the sizes from their base.
        pretrained = "model:" in settings.read_text(encoding="utf-8").splitlines()
        found.append((not pretrained, settings.stat().st_mtime, str(settings.parent)))
    if not found:
        raise UserError("no finished run in runs/. Train a model, or pass one with --model.")
    tuned, _, folder = max(found)
    return folder, not tuned


def answer(
    model: Transformer, tokenizer: Tokenizer, messages: list[Message], sampling: Sampling,
    thinking: bool = True,
) -> Message:  # fmt: skip
    """Print the assistant's answer as it is generated, and return it.

    Removes the oldest exchanges from `messages` until the prompt fits, with up to half of the
    context reserved for the answer. Raises UserError if the last message does not fit.
    """
    limit = model.config.max_position_embeddings
    longest = limit - min(sampling.max_new_tokens, limit // 2)
    first = 1 if messages[0]["role"] == "system" else 0
    while (
        len(ids := render_prompt(tokenizer, messages, thinking)) > longest
        and len(messages) > first + 2
    ):
        del messages[first : first + 2]
        print("(removed the oldest exchange, which no longer fits in the context)", file=sys.stderr)
    texts = print_new_text(model, tokenizer, ids, sampling)
    if thoughts := texts.get("reasoning_content"):
        texts["reasoning_content"] = thoughts.removesuffix("\n")
    return {"role": "assistant", **texts, **({} if thinking else {"enable_thinking": False})}


def generate(model: Transformer, ids: Sequence[int], sampling: Sampling,
             stop_ids: Sequence[int] = ()) -> Iterator[int]:  # fmt: skip
    """Yield new ids up to a stop id (included) or a limit; raises ValueError as decode does."""
    generator = seeded_generator(sampling.seed, next(model.parameters()).device)
    for new in decode(model, [ids], sampling, stop_ids, generator, [sampling.max_new_tokens]):
        yield new[0]


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Yield the text of ids as they arrive, in complete characters; bad UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for id_ in ids:
        if text := decoder.decode(tokenizer.decode_bytes([id_])):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def continue_text(model: Transformer, tokenizer: Tokenizer, text: str, sampling: Sampling) -> None:
    """Print a continuation of `text`, the start of a document without a chat format."""
    ids = [tokenizer.end_of_text_id, *tokenizer.encode(text)]
    print_new_text(model, tokenizer, ids, sampling)


def print_new_text(
    model: Transformer, tokenizer: Tokenizer, ids: list[int], sampling: Sampling
) -> dict[str, str]:
    """Print what the model generates after `ids`, thoughts on stderr; Ctrl-C stops it.

    Returns "content" and, for thoughts, "reasoning_content". Raises UserError if `ids` do not fit.
    """
    if len(ids) >= (limit := model.config.max_position_embeddings):
        raise UserError(f"the prompt has {len(ids)} tokens; shorten it to at most {limit - 1}")
    texts = {"content": ""}

    def show(name: str, pieces: Iterator[str], stream: TextIO) -> None:
        for piece in pieces:
            texts[name] = texts.get(name, "") + piece
            print(piece, end="", flush=True, file=stream)

    new_ids = generate(model, ids, sampling, tokenizer.stop_ids)
    newlines = re.compile(r"\n*").fullmatch
    begin, end = map(tokenizer.tag_id, ("<think>", "</think>"))
    with contextlib.suppress(KeyboardInterrupt):
        if (first := next(new_ids)) == begin:  # Newlines separate tags from thoughts and answer.
            thoughts = stream_text(tokenizer, takewhile(lambda id_: id_ != end, new_ids))
            show("reasoning_content", dropwhile(newlines, thoughts), sys.stderr)
            show("content", dropwhile(newlines, stream_text(tokenizer, new_ids)), sys.stdout)
        else:
            show("content", stream_text(tokenizer, chain([first], new_ids)), sys.stdout)
    print(flush=True)
    return texts


def converse(
    model: Transformer, tokenizer: Tokenizer, system: list[Message], sampling: Sampling,
    raw: bool = False, thinking: bool = True,
) -> None:  # fmt: skip
    """Answer questions, or continue each line if `raw`, until the input ends or is /quit."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # Adds line editing to input().
    first = "each line is continued as a separate text" if raw else "/new starts a new conversation"
    print(f"{first}, /quit exits", file=sys.stderr)
    messages = list(system)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        question = line.strip()
        if question == "/quit":
            return
        if question == "/new" and not raw:
            messages = list(system)
        elif question:
            try:
                if raw:
                    continue_text(model, tokenizer, line, sampling)
                    continue
                asked = [*messages, {"role": "user", "content": question}]
                message = answer(model, tokenizer, asked, sampling, thinking)
                messages = [*asked, message]
            except UserError as error:
                print(f"({error})", file=sys.stderr)


def main() -> None:
    """Parse the command line, then chat or answer once."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        help="model folder (default: the newest final/ of an SFT or DPO run in runs/; if there is "
        "none, of a pretraining run, with --raw)",
    )
    parser.add_argument("--raw", action="store_true", help="continue texts, without a chat format")
    parser.add_argument(
        "--prompt", type=valid_text, help="print one answer to this text on stdout and exit"
    )
    parser.add_argument("--system", type=valid_text, default="", help="system message")
    parser.add_argument("--no-think", action="store_true", help="answer without thoughts")
    sampling_keys = keys(Sampling)
    for key in sampling_keys:
        number = int if key.default is None else type(key.default)
        shown = f"{key.doc} (default: {key.default})"
        option = "--" + key.name.replace("_", "-")
        parser.add_argument(option, type=number, default=key.default, help=shown)
    options = parser.parse_args()
    try:
        if options.prompt is not None and not options.prompt.strip():
            raise UserError("--prompt is empty. Pass the text to answer.")
        sampling = Sampling(**{key.name: getattr(options, key.name) for key in sampling_keys})
        folder, raw = options.model or "", options.raw
        if not folder:
            folder, pretrained = newest_model()
            raw = raw or pretrained
        if raw and (options.system or options.no_think):
            raise UserError(f"{folder}: --raw has no turns. Remove --system and --no-think.")
        if options.prompt is None or not options.model:
            print(f"model: {folder}{', continues texts (--raw)' * raw}", file=sys.stderr)
        model, tokenizer = load_model(folder, "--model "), load_tokenizer(folder)
        messages: list[Message] = [{"role": "system", "content": options.system}]
        messages = messages if options.system else []
        if options.prompt is None:
            converse(model, tokenizer, messages, sampling, raw, not options.no_think)
        elif raw:
            continue_text(model, tokenizer, options.prompt, sampling)
        else:
            messages.append({"role": "user", "content": options.prompt})
            answer(model, tokenizer, messages, sampling, not options.no_think)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
