"""The library, five levels: core, data, models, engine, evaluation (docs/development.md)."""
