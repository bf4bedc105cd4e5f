"""Medusa: a head for every position ahead."""
