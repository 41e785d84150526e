"""Dense against pruned, and FP16 against FP32, on a real GPU: `python -m benchmarks.gpu.run`."""
