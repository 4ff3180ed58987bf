"""What there is to solve, with its splits: TensorFlow Datasets builders, read without TensorFlow."""
