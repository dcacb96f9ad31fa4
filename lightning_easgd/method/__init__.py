"""The mathematics of elastic averaging and of its baselines, as pure functions and small immutable objects."""
