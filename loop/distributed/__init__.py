"""Several processes: starts, connects and watches them, and exchanges tensors."""
