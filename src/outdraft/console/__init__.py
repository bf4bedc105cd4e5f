"""What the command line needs beside its verbs: options, error policy, rendering, settings files.

Imports neither torch nor transformers when read, so that `--help` answers at once.
"""
