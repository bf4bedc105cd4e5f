"""Batch-invariant greedy decoding: every row of a forward has the bits of a one-token forward."""
