"""The published benchmarks: runs of `mmer_fast.bench`, what they promise, tables, plots and pages from their rows."""
