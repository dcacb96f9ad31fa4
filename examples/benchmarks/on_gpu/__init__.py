"""What the benchmark gpu measures, one thing a module; each is a rank of :func:`harness.ranks.run_ranks`."""
