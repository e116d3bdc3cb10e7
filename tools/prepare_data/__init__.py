"""Sample data preparation: `python -m tools.prepare_data` (see __main__.py)."""
