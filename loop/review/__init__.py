"""Shows what the trained model writes."""
