"""The judge: features, distances, reconstruction scores, the linear probe."""
