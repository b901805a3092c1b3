"""Sources of samples, transforms, order and loader."""
