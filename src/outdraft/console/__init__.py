"""The command line's larger verbs, and the options that verbs share. Importing them loads no torch."""
