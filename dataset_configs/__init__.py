"""One data-only mmengine config per benchmark, class word lists and protocol presets; no code."""
