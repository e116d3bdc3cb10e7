"""What everything else stands on: errors, files, settings, hardware, ranks."""
