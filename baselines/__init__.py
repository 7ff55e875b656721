"""Attention MIL baselines: plain torch models, one file each, written from their papers."""
