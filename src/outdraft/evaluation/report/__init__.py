"""HTML pages of measurements."""
