"""Arms compared over seeds and learning rates: Shadow-FT (B2I) with direct tuning (I2I) and the controls."""
