"""Descriptions of classes by attributes, the sentences made of them, and how they are checked and generated."""

from ovbench.words.prompts.descriptions import ATTRIBUTES, Descriptions, Entry, read, shipped
from ovbench.words.prompts.sentences import DEFAULT_ATTRIBUTES, Described, Prompts, described, sentence

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
