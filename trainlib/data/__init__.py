"""Data pipeline from files to batches: readers, formats, encoding, token cache, packing, loader."""
