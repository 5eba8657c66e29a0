"""What `tune run NAME` runs. Each recipe works alone and as a part of the chain, on the same config file."""
