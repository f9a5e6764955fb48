"""Sections of `gpu_check.py`: each takes a `Machine` and yields `Finding`s."""
