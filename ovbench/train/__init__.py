"""Training of the methods that can be trained; ``run.train`` is the way in."""
