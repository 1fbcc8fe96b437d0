"""Models for other libraries: directories, onnx, and the model card."""
