"""Optional faster replacements for functions in model.py."""
