"""Text, prompts and conversations, from files to token ids."""
