"""Class-agnostic mask proposals of an image: what a mask-based method classifies."""
