"""The algorithm's parts: weights, fitness, digest."""
