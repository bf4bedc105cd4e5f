"""What methods learn from: features of the target, its distribution, and losses over them."""
