"""Pages of HTML that show what was measured."""
