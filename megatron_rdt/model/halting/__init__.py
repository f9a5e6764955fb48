"""Halting: units trained to stop, exit rules at inference, and the loop that skips tokens that have stopped."""
