"""Forward and backward over stages of a model on several devices: where it is cut, who computes when."""
