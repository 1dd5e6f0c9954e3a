"""Descriptions of classes by attributes, the sentences made of them, and how they are checked and generated."""

from ovbench.prompts.descriptions import ATTRIBUTES, Descriptions, Entry, read, shipped
from ovbench.prompts.sentences import DEFAULT_ATTRIBUTES, Described, Prompts, described, sentence

__all__ = [
    "ATTRIBUTES",
    "DEFAULT_ATTRIBUTES",
    "Described",
    "Descriptions",
    "Entry",
    "Prompts",
    "described",
    "read",
    "sentence",
    "shipped",
]
