"""Hand-over to engines: the integer network, ONNX, and what runs it."""
