"""Who prefers which of two answers: a model behind an endpoint, a reward model, a function."""
