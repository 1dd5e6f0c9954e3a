"""Records of runs: their layout, their files and tables made from them; imports no torch."""
