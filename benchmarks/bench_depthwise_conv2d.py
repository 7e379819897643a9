"""depthwise_conv2d: conv2d with one filter per channel, which the mobile networks are made of."""

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.bench_conv2d import build  # noqa: F401  (the same problem)

CASES = cases.traced("depthwise_conv2d")
