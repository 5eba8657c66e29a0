"""What every step of the chain costs or wins, measured on held-out text and on the exported file."""
