"""What can be said about a model: how much of it is captured, how large it is once quantized."""
