"""Calibration: quantization parameters from real activations."""
