"""Readers of every on-disk layout of tile features."""
