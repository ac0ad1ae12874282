"""spoolipc measured beside its peers: `python -m benchmarks`, then `python -m benchmarks.report`.

The pairs of processes and the way of timing are those of `benchmarks.pair`; the peers are in `benchmarks.carriers`,
one a module. Nothing here asserts a time.
"""
