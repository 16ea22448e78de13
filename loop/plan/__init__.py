"""What memory a run will take, before it takes it. Training never imports this package: it runs beside it."""
