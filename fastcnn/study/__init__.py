"""Networks on paper: the calls they make, and the bytes and FLOPs these cost."""
