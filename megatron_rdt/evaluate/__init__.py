"""What a model has learned: losses over loop counts, reports."""
