"""Routed experts: quantized weights, routing of tokens, forward and backward by hand, counts of use."""
