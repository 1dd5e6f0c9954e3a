"""Frozen networks: DenseCLIP and its weights (later attention sources, SAM and mask generators)."""
