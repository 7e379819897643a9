"""Files of weights, of torch.save or safetensors."""


def load(model, path):
    raise NotImplementedError
