"""From what a user gives to rows that are decoded, and back."""
