"""The machinery around the science: data, runs, training and studies over object storage, Ray and DeepSpeed."""
