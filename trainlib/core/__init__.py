"""Foundations of all other packages: errors, files, settings, hardware, distributed processes."""
