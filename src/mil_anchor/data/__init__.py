"""Bags, their splits and the loaders that batch them."""
