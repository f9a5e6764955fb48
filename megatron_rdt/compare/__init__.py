"""Comparison of matched runs: arms made from one config, their measurements, paired differences, table and page."""
