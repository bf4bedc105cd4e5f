"""The drafter protocol, and the tools that drafters share."""
