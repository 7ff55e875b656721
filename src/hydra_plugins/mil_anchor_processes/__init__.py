"""Hydra finds launchers below ``hydra_plugins`` only: that of `mil_anchor.sweep.processes`."""
