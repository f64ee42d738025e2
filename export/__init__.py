"""Checkpoints in, bundles out. Needs the extra `export` (torch); runs on a PC, or on a board with patience."""
