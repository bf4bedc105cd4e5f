"""The protocol that every drafter keeps, and the tools that drafters share."""
