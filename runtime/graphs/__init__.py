"""What runs graphs: ONNX Runtime and TensorRT, their devices, and engines built for this machine."""
