"""Text generation with the model as it trains."""
