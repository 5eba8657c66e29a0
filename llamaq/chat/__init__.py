"""Talk to a model: conversations through a KV cache, and the terminal."""
