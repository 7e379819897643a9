"""Deep compression: small weights removed, the others shared among few values, what is left coded.

Source: Han, Mao and Dally: Deep compression: compressing deep neural networks with pruning, trained quantization and
Huffman coding, 2016. The decks: SqueezeNet, whose weights take 5 MB, "can compress to 510x smaller than AlexNet"
(0.47 MB; Iandola et al. 2016). The network is trained on after each step, as the papers do:

    compression.prune(model, density=0.33)      # masks: what is removed stays 0 in training
    train(model)
    compression.share(model, bits=6)            # at most 64 values per layer, which alone are trained from now on
    train(model)
    content = compression.compress(model)       # bytes, for a file
    compression.decompress(content, create_model("squeezenet1_0"))

`compress` alone does it without training in between. Layers are Conv2d and Linear; all else is kept as it is.
"""

import io
import json
import math
import zlib

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as pruning

from fastcnn.models import weights

MAGIC = b"fastcnn compressed 1\n"
GAP = 255  # zeros before a weight are counted in a byte; this one says: so many zeros, and no weight yet
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def prune(model, density=0.33):
    """Remove the smallest weights of every layer, in place: masks of torch.nn.utils.prune keep them 0 in training.

    Args:
        model: module. Pruned layers are pruned further, or less, by the weights they have now.
        density: share of the weights that stays, in (0, 1].

    Raises:
        ValueError: density is out of range, or a layer's weights are shared already.
    """
    _check(density, 1)
    layers = _layers(model)
    if any(map(_is_shared, layers.values())):
        raise ValueError("prune before share: a layer shares its weights already")
    for layer in layers.values():
        if hasattr(layer, "weight_mask"):
            pruning.remove(layer, "weight")
        pruning.l1_unstructured(layer, "weight", 1.0 - density)


def share(model, bits=6):
    """Give the weights of every layer at most 2**bits values, by k-means that starts from values at equal distances.

    In place. The values, not the weights, are the layer's parameters from then on (make a new optimizer): their
    gradients are the sums of those of the weights that share them. Zeros stay zeros. Shared layers stay as they are.

    Raises:
        ValueError: bits is no int of 1 to 8, or a weight is not finite.
    """
    _check(1.0, bits)
    for name, layer in _layers(model).items():
        if not _is_shared(layer):
            shared = Shared(_clusters(_weight(layer), bits, name))
            if hasattr(layer, "weight_mask"):
                pruning.remove(layer, "weight")
            parametrize.register_parametrization(layer, "weight", shared)


class Shared(nn.Module):
    """Parametrization of a weight by its values: weight = values[clusters - 1], or 0 where clusters is 0.

    Args:
        clusters: int16 tensor of the weight's shape, 0 for removed weights, others from 1 on, none of them empty.
    """

    def __init__(self, clusters):
        super().__init__()
        self.register_buffer("clusters", clusters)

    def forward(self, values):
        return torch.cat([values.new_zeros(1), values])[self.clusters.long()]

    def right_inverse(self, weight):
        """The mean of every cluster."""
        clusters = self.clusters.flatten().long()
        counts = clusters.bincount()
        sums = counts.new_zeros(len(counts), dtype=torch.float64)
        sums.index_add_(0, clusters, weight.detach().flatten().double())
        return (sums / counts)[1:].to(weight.dtype)


def compress(model, density=0.33, bits=6):
    """Code a model's weights as bytes. The model is left as it is.

    Of each layer: how many zeros stand before each weight, which of the layer's values it is, both with Huffman's code
    (of zlib), and the values.

    Args:
        model: module, on any device; layers that `prune` or `share` did not prepare are prepared on a copy.
        density, bits: as of `prune` and `share`, for those layers.

    Raises:
        ValueError: density or bits is out of range, or a weight is not finite.
    """
    _check(density, bits)
    entries, streams, coded = [], [], set()

    def add(name, tensor, *parts):
        streams.extend(map(_huffman, parts))
        sizes = [len(part) for part in streams[-len(parts) :]]
        entries.append({"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype), "sizes": sizes})

    for name, layer in _layers(model, remove_duplicate=False).items():
        prefix = f"{name}." if name else ""
        add(f"{prefix}weight", layer.weight, *_of_layer(name, layer, density, bits))
        parametrized = [f"parametrizations.weight.{key}" for key in ("original", "0.clusters")]
        coded |= {prefix + key for key in ("weight", "weight_orig", "weight_mask", *parametrized)}
    for name, tensor in model.state_dict().items():
        if name not in coded:
            add(name, tensor, _bytes(tensor))
    header = zlib.compress(json.dumps(entries).encode(), 9)
    content = b"".join([MAGIC, len(header).to_bytes(4, "little"), header, *streams])
    return content + zlib.crc32(content).to_bytes(4, "little")


def decompress(content, model):
    """Load what `compress` made into a model that has the keys and shapes of the one it was made of; returns it.

    Raises:
        ValueError: the content is damaged or of another network; the model is left as it was.
    """
    tensors = {}
    for entry, parts in _entries(content):
        dtype = DTYPES[entry["dtype"]]
        flat = torch.frombuffer(bytearray(parts[-1]), dtype=dtype) if parts[-1] else torch.empty(0, dtype=dtype)
        if len(parts) == 3:
            gaps, clusters, values = *(np.frombuffer(part, np.uint8).astype(np.int64) for part in parts[:2]), flat
            flat = torch.zeros(math.prod(entry["shape"]), dtype=dtype)
            flat[torch.from_numpy(_positions(gaps))] = values[torch.from_numpy(clusters)]
        tensors[entry["name"]] = flat.reshape(entry["shape"])
    weights.put(model, tensors, "the compressed content")
    return model


def report(content):
    """A table of what `compress` made: of each layer the weights, how many are left, how many values they have, and the
    bytes before and after; in the last line those of the whole, all else included.

    Raises:
        ValueError: the content is damaged.
    """
    rows = [f"{'layer':32} {'weights':>11} {'left':>8} {'values':>7} {'bytes':>10} {'compressed':>11} {'times':>6}"]
    total = 0
    for entry, parts in _entries(content):
        count, itemsize = math.prod(entry["shape"]), DTYPES[entry["dtype"]].itemsize
        before, after = count * itemsize, sum(entry["sizes"])
        total += before
        if len(parts) == 3:
            kept = f"{count:>11,} {len(parts[1]) / count:>8.1%} {len(parts[2]) // itemsize:>7}"
            rows.append(f"{entry['name']:32} {kept} {before:>10,} {after:>11,} {before / after:>6.1f}")
    return "\n".join([*rows, f"{'all':61} {total:>10,} {len(content):>11,} {total / len(content):>6.1f}"])


def _check(density, bits):
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density!r}")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an int of 1 to 8, got {bits!r}")


def _layers(model, **options):
    kinds = (nn.Conv2d, nn.Linear)
    return {name: module for name, module in model.named_modules(**options) if isinstance(module, kinds)}


def _is_shared(layer):
    return parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], Shared)


def _weight(layer):
    # `weight` has the mask, and the latest weights, only after a forward pass
    return (layer.weight_orig * layer.weight_mask if hasattr(layer, "weight_mask") else layer.weight).detach()


def _clusters(weight, bits, name):
    """Which of at most 2**bits clusters each element is of, from 1 on, 0 for zeros: an int16 tensor."""
    if not weight.isfinite().all():
        raise ValueError(f"the weight of {name} has elements that are not finite")
    flat = weight.double().cpu().numpy().ravel()
    kept = np.flatnonzero(flat)
    labels = np.unique(flat[kept], return_inverse=True)[1]
    if len(kept) and labels.max() >= 2**bits:
        samples = flat[kept, None]
        start = np.linspace(samples.min(), samples.max(), 2**bits)[:, None]
        labels = KMeans(2**bits, init=start, n_init=1).fit(samples).labels_
        labels = np.unique(labels, return_inverse=True)[1]
    clusters = torch.zeros(flat.size, dtype=torch.int16)
    clusters[torch.from_numpy(kept)] = torch.from_numpy(labels + 1).short()
    return clusters.reshape(weight.shape).to(weight.device)


def _of_layer(name, layer, density, bits):
    """What is coded of a layer: the gaps before its weights, whose value is whose, the values."""
    if _is_shared(layer):
        shared, values = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    else:
        weight = _weight(layer)
        if not hasattr(layer, "weight_mask"):
            weight = pruning.L1Unstructured(1.0 - density).prune(weight)
        shared = Shared(_clusters(weight, bits, name))
        values = shared.right_inverse(weight)
    clusters = shared.clusters.flatten().cpu().numpy()
    kept = np.flatnonzero(clusters)
    return _gaps(kept), (clusters[kept] - 1).astype(np.uint8).tobytes(), _bytes(values)


def _gaps(positions):
    """Bytes that say how many zeros stand before each of the positions."""
    zeros = np.diff(positions, prepend=-1) - 1
    fillers = zeros // GAP
    found = np.full(len(zeros) + fillers.sum(), GAP, np.uint8)
    found[np.cumsum(fillers + 1) - 1] = zeros % GAP
    return found.tobytes()


def _positions(gaps):
    ends = np.cumsum(gaps + (gaps < GAP))
    return ends[gaps < GAP] - 1


def _huffman(data):
    # matches of earlier bytes help where few weights or none were removed, and cost where they stand at random
    found = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY):
        coder = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
        found.append(coder.compress(data) + coder.flush())
    return min(found, key=len)


def _bytes(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _entries(content):
    """(entry of the header, its parts) of every tensor."""
    if not content.startswith(MAGIC):
        raise ValueError(f"the compressed content does not begin as that of fastcnn, with {MAGIC!r}")
    if zlib.crc32(content[:-4]).to_bytes(4, "little") != content[-4:]:
        raise ValueError("the compressed content is damaged or truncated: its checksum is wrong")
    stream = io.BytesIO(content[len(MAGIC) :])
    header = json.loads(zlib.decompress(stream.read(int.from_bytes(stream.read(4), "little"))))
    return [(entry, [zlib.decompress(stream.read(size)) for size in entry["sizes"]]) for entry in header]
