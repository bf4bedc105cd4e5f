"""Measuring: several ways of decoding over the same prompts in turns, how much faster they are, and whether the text
stays the same."""
