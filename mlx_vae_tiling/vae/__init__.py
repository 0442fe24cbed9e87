"""The LTX video decoder: configs, exact streaming and checkpoints."""
