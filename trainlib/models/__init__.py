"""Model folders (hf_folder.py) and text generation (generate.py)."""
