"""`python -m outdraft` is `outdraft`."""

from outdraft.cli import main

main()
