"""Earlier name of tools/train_tokenizer.py: `python -m tokenizer.train_tokenizer` still works."""

from runpy import run_module

if __name__ == "__main__":
    run_module("tools.train_tokenizer", run_name="__main__")
