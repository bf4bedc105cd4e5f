"""The command line's verbs, a file each, and their shared options. Importing them loads no torch: `--help` is quick."""
