"""Reports about a trained model: baselines, worst rows, preferences, model card."""
