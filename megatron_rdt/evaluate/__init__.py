"""Evaluation of trained models: validation loss over loop counts, and the report of a run."""
