"""Chat with a model interactively, or print one answer with --prompt."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from model import Transformer
from tokenizer.bpe import Tokenizer
from tokenizer.chat_format import Message, render_prompt
from trainlib.core.errors import UserError
from trainlib.models.generate import Sampling, generate, stream_text
from trainlib.models.hf_folder import load_model, load_tokenizer

DEFAULT_MODELS = ("runs/dpo/final", "runs/sft/final", "runs/demo/dpo/final")


def answer(
    model: Transformer, tokenizer: Tokenizer, messages: list[Message], sampling: Sampling
) -> str:
    """Print the assistant's answer as it is generated, and return it; Ctrl-C stops it.

    Removes the oldest exchanges from `messages` until the prompt fits, with up to half of the
    context reserved for the answer. Raises UserError if the last message does not fit.
    """
    limit = model.config.max_position_embeddings
    longest = limit - min(sampling.max_new_tokens, limit // 2)
    first = 1 if messages[0]["role"] == "system" else 0
    while len(ids := render_prompt(tokenizer, messages)) > longest and len(messages) > first + 2:
        del messages[first : first + 2]
        print("(removed the oldest exchange, which no longer fits in the context)", file=sys.stderr)
    if len(ids) >= limit:
        raise UserError(f"the prompt has {len(ids)} tokens; shorten it to at most {limit - 1}")
    pieces = []
    new_ids = generate(model, ids, sampling, tokenizer.stop_ids)
    with contextlib.suppress(KeyboardInterrupt):
        for piece in stream_text(tokenizer, new_ids):
            pieces.append(piece)
            print(piece, end="", flush=True)
    print(flush=True)
    return "".join(pieces)


def converse(
    model: Transformer, tokenizer: Tokenizer, system: list[Message], sampling: Sampling
) -> None:
    """Answer questions until the input ends; /new starts a new conversation, /quit exits."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # Adds line editing to input().
    print("/new starts a new conversation, /quit exits", file=sys.stderr)
    messages = list(system)
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if question == "/quit":
            return
        if question == "/new":
            messages = list(system)
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                text = answer(model, tokenizer, messages, sampling)
            except UserError as error:
                messages.pop()
                print(f"({error})", file=sys.stderr)
                continue
            messages.append({"role": "assistant", "content": text})


def main() -> None:
    """Parse the command line, then chat or answer once."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = next((name for name in DEFAULT_MODELS if Path(name).is_dir()), None)
    parser.add_argument("--model", default=default, help=f"model folder (default: {default})")
    parser.add_argument("--prompt", help="print one answer to this text on stdout and exit")
    parser.add_argument("--system", default="", help="system message (default: none)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 = greedy (default: 0.7)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.9,
        help="use the likeliest tokens up to this probability; 1 = all (default: 0.9)",
    )
    parser.add_argument("--top-k", type=int, default=0, help="use only the top K tokens; 0 = all")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        help="maximum length of an answer in tokens (default: 512)",
    )
    parser.add_argument("--seed", type=int, help="seed for sampling (default: a new one each time)")
    options = parser.parse_args()
    try:
        if options.model is None:
            raise UserError(f"no model in {', '.join(DEFAULT_MODELS)}; pass one with --model")
        if options.prompt is not None and not options.prompt.strip():
            raise UserError("--prompt is empty. Pass the text to answer.")
        sampling = Sampling(
            options.temperature, options.top_p, options.top_k, options.max_new_tokens, options.seed
        )
        model, tokenizer = load_model(options.model, "--model "), load_tokenizer(options.model)
        messages: list[Message] = []
        if options.system:
            messages.append({"role": "system", "content": options.system})
        if options.prompt is None:
            print(f"model: {options.model}", file=sys.stderr)
            converse(model, tokenizer, messages, sampling)
        else:
            messages.append({"role": "user", "content": options.prompt})
            answer(model, tokenizer, messages, sampling)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
