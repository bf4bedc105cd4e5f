"""Training's view of the target: its features, its probabilities, and losses over them."""
