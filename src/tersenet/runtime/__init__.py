"""Networks that run from their packed weights: forms that a processor multiplies with, and modules of torch."""
