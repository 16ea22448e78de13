"""From a model's name to its tensors: find or download, read headers, stream slices."""
