"""EAGLE-3: a one-layer drafter on the states of three layers."""
