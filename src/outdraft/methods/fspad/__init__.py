"""FSPAD and EAGLE: a one-layer drafter on the target's features."""
