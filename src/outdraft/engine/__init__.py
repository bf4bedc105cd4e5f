"""The decoding round, and the batches that run it."""
