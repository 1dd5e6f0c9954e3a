"""Pure tensor functions: windows, the decision from logits to labels, areas."""
