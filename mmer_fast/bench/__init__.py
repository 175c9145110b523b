"""Benchmarks of the operators: every contestant is held against the float64 reference, then timed in turns with others.

    soft_topk, attention, perturbation   cases, contestants and how they are measured
    timing, counters                     time, memory and launches of a call
    ceilings, roofline                   what the machine can do, and which share of it a call reaches
    shapes, commands                     your own shapes: `mmer-fast bench`

The published measurements, what they promise, their tables and plots are in `benchmarks/` of the repository.
"""
