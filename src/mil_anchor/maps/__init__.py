"""Attention maps: what a run keeps of its attention, and how it is drawn and exported."""
