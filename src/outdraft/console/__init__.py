"""The command line's verbs, a file each, and what they share. Reading them imports no torch, so `--help` is quick."""
