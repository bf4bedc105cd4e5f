"""An OpenAI-compatible server: requests join and leave the rows of one running batch (docs/guides/serve.md)."""
