"""Environments that come with shardes, as examples of the protocol."""
