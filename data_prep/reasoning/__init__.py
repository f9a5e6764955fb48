"""Generated reasoning tasks with exact answers, as training and test examples."""
