"""The demo's rows, and the code that writes them from legal chess positions."""
