"""Output-aware quantization of a whole network at one global step, and the search for the step."""
