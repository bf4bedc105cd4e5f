"""The mathematics of speculative decoding: trees, sampling, verification. Knows no model and no drafter."""
