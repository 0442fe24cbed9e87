"""What this machine does with a convolution: measured, and kept."""
