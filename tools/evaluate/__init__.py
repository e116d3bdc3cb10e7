"""Evaluation of a trained model, or of two models on the same items.

    python -m tools.evaluate --model DIR [--model DIR2] [--data FILE...] [--json] [--card]

data.py       which files are measured: those of the model's run, else the sample's
measure.py    the results of one model, item by item
answers.py    answers to held-out prompts, and whether they repeat themselves
report.py     the table and the JSON object, with the differences between two models
tasks/        the same text as a task for lm_eval
"""
