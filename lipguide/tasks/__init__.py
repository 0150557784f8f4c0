"""Networks that learn something: classification, segmentation and detection of house numbers."""
