"""What is seen of a network while it runs: its operations, which norm reads which layer, which channels go together."""
