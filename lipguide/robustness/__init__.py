"""What a network withstands: attacks, certificates, scores, metrics, smoothing."""
