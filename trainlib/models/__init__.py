"""A model on disk (hf_folder.py), and text that it writes (generate.py)."""
