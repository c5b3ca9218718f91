"""Master weights of a rank's shards, and operations on them."""
