"""Export to inference engines: the integer network, ONNX, and engines that run it."""
