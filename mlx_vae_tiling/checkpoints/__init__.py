"""Checkpoints: finding, fetching and describing the file that holds a decoder, and loading it."""
