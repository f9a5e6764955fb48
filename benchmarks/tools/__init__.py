"""What several benchmarks measure with. Nothing here runs by itself."""
