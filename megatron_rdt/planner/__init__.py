"""Run plans: parameters, memory, communication and time that a run will need, computed from its config alone.

`measure.py` takes real steps to check the arithmetic.
"""
