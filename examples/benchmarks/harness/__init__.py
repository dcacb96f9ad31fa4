"""What the benchmarks share: ranks, methods, turns, networks, results and figures."""
