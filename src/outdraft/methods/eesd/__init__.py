"""EESD: the target's own first layers and a trained exit layer."""
