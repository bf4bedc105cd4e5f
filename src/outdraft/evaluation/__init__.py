"""Measuring and checking: `bench/` compares ways of decoding, `audit/` checks that drafting keeps the target's output
distribution, `report/` makes HTML pages of both."""
