"""The benchmark behind `outdraft bench`: several ways of decoding over the same prompts, in turns."""
