"""Benchmarks: one case table, one list of contestants, one harness; results are JSON rows (see `benchmarks.run`)."""
