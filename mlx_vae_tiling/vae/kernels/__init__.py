"""The arithmetic of each device, beside the memory that it takes."""
