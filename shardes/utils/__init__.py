"""Files, logging, timing and units."""
