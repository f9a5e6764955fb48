"""Helpers that several benchmarks share: options, clocks, worker processes, tables, rates. No script among them."""
