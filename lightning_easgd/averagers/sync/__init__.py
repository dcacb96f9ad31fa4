"""Synchronous elastic averaging: a center on every worker, moved by the sum of all differences."""
