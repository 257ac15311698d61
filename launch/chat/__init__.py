"""The chat page: a browser's window on any OpenAI-compatible server, or on a run."""
