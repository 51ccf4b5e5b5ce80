"""Allocators: a budget over the whole network to a choice for each tensor."""
