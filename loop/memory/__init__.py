"""What memory is held: by phase of a step, by tensor and source line, and when it runs out."""
