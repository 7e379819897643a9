"""Fused optimizers with torch.optim's constructors and state_dict."""
