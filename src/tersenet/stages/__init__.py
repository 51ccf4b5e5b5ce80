"""Stages: each takes a draft of the network to a better one."""
