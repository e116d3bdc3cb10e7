"""Measure a trained model, or two models on the same items.

Bits per byte and perplexity by source, next to what n-grams reach on that text; skills; preferences
next to trivial rules; and how often answers repeat themselves and end. By default, the model is
measured on the validation files of its run, else on those of the sample. The result is on stdout,
everything else on stderr.
"""

from __future__ import annotations

import trainlib.core.threads  # noqa: F401  # Before torch.

import argparse
import json
import sys
from pathlib import Path

from tools.evaluate.data import default_data, is_pretrained, named_data, run_of
from tools.evaluate.measure import measure
from tools.evaluate.report import as_json, card_parts, table, write_to_card
from trainlib.core.errors import UserError
from trainlib.core.terminal import use_replacement_characters
from trainlib.models.hf_folder import load_config


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    use_replacement_characters()
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=__doc__)
    parser.add_argument("--model", action="extend", nargs="+", required=True, metavar="DIR",
                        help="model folder; two folders are compared item by item")  # fmt: skip
    parser.add_argument("--data", action="extend", nargs="+", metavar="FILE",
                        help="measure on these files, folders or patterns instead")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--card", action="store_true",
                        help="also write each model's table into its model card")  # fmt: skip
    options = parser.parse_args(argv)
    if len(options.model) > 2:
        parser.error(f"--model takes at most two folders, found {len(options.model)}")
    folders = [Path(name) for name in options.model]
    try:
        for folder in folders:
            load_config(folder, "--model ")
        if options.data:
            data = named_data(options.data, folders)
        else:
            data = default_data(folders, kinds_of(folders))
        if all(map(is_pretrained, folders)) and "pretrain" not in data:
            names = " and ".join(options.model)
            raise UserError(f"{names}: only pretrained, so --data needs a file with texts")
        for folder in folders if options.card else ():
            card_parts(folder)  # Raises UserError before the models are measured.
        results = [measure(name, data) for name in options.model]
        for result in results if options.card else ():
            write_to_card(result)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(as_json(results), ensure_ascii=False) if options.json else table(results))
    return 0


def kinds_of(folders: list[Path]) -> list[str]:
    """Return the kinds of rows that models are measured on by default.

    A chat model is measured on conversations and pairs; on documents only if it is compared with a
    pretrained model, or if nothing is known about it.
    """
    stages = {run_of(folder)[0] for folder in folders}
    texts = ["pretrain"] if stages & {"pretrain", ""} else []
    return texts + (["sft", "dpo"] if stages != {"pretrain"} else [])


if __name__ == "__main__":
    sys.exit(main())
