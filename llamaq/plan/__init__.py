"""What a run needs and whether it can start: memory, disk, and a check of everything it will read."""
