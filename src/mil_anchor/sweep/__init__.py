"""Sweeps: many runs, each its own job, that go on where they stopped."""
