"""The round and the batches that it runs over."""
