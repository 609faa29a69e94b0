"""What calibration shows a model: windows of tokens cut from a text."""
