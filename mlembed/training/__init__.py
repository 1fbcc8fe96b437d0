"""One optimiser step and everything that it needs: objective, gradient cache, engine, resume."""
