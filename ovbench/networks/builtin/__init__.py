"""The embedded default: a small CLIP that was really trained, and the generated scenes that it knows.

``scenes.render`` draws a scene of given words, ``weights.load_state_dict`` gives the network in OpenAI's CLIP layout,
``python -m ovbench.networks.builtin.train`` makes it again. For trying the suite without any download; every class name was
trained and the demo's scenes come from the same generator, so a score is a check of the pipeline and no evidence about
open-vocabulary ability or the ranking of methods.
"""
