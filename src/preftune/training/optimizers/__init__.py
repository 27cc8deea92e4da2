"""Optimizers besides PyTorch's fused ones; `training.optimizer` makes them by name."""
