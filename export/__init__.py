"""Export: the same function as an ONNX graph."""
