"""Detection of house numbers: single-shot detectors, ordinary and 1-Lipschitz."""
