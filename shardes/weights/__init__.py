"""Master weights of a rank's shards, and functions over them."""
