"""One folder or file a drafting method."""
