"""What a trained model is reported by: baselines, worst rows, preferences."""
