"""Cost aggregation: image-text similarities refined in space and across classes, and brought to a finer grid.

The network of CAT-Seg (Cho et al., CVPR 2024, arXiv 2303.11797), in plain torch. Maps of all classes of all images of a
batch go through it together, as tokens (B, T, h, w, C) with T classes. Names of parameters are those of the public code, so
that its checkpoints load.
"""
