"""The mathematics of speculative decoding: trees, sampling, verification, without models or drafters."""
