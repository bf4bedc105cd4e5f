"""The drafting methods, each in a folder of its own."""
