"""Group quantization: tensors as small integers with a scale and a minimum for each group. Knows nothing of models."""
