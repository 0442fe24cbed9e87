"""One decode by several machines."""
