"""The fast path: weights packed once per device and precision, and stages that skip what cannot matter."""
