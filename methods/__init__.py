"""One module per method; imported as ``ovbench.methods``."""
