"""From a float32 ONNX graph to one whose every tensor has a type, and the proof that it is right.

Precision lives in the graph: strongly typed TensorRT builds compute exactly what it says. No torch
here; what PyTorch computes comes as arrays.
"""
