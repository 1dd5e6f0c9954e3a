"""Numbers that the papers print, as data; packaged as ``ovbench.published``."""
