"""Averaging with a served center, on each worker's own clock."""
