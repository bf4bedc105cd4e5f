"""The Python interface: turns a user's models, prompts and settings into decoded rows, and rows into outputs."""
