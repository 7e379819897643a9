"""The pictures of a run folder. Matplotlib is imported when the first one is drawn."""

import io

from fastcnn.train.checkpoint import write_atomically


def plot_curves(history, path):
    """Loss and accuracy over the epochs, training and validation.

    Args:
        history: rows of metrics.csv, as dicts.
        path: the PNG.
    """
    figure, axes = _figure(1, 2, (10, 4))
    epochs = [row["epoch"] for row in history]
    for ax, what in zip(axes[0], ("loss", "accuracy"), strict=True):
        for part, label in (("train", "training"), ("val", "validation")):
            ax.plot(epochs, [row[f"{part}_{what}"] for row in history], label=label)
        ax.set(xlabel="epoch", ylabel=what)
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0][0].set_yscale("log")
    _save(figure, path)


def plot_confusion(confusion, classes, path, title):
    """A confusion matrix: rows are the true classes, columns the predicted ones.

    Args:
        confusion: int tensor [C, C].
        classes: C names.
        path: the PNG.
        title: above the picture.
    """
    count = len(classes)
    figure, axes = _figure(1, 1, (max(5, min(count * 0.5, 20)),) * 2)
    ax = axes[0][0]
    # share of each true class, so that rare classes show too
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    ax.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    if count <= 30:
        ax.set_xticks(range(count), classes, rotation=90 if max(map(len, classes)) > 3 else 0)
        ax.set_yticks(range(count), classes)
        for row in range(count):
            for col in range(count):
                if n := int(confusion[row, col]):
                    ax.text(col, row, n, ha="center", va="center", color="white" if row == col else "black", fontsize=8)
    ax.set(xlabel="predicted", ylabel="true", title=title)
    _save(figure, path)


def plot_filters(model, path):
    """The filters of the first convolution: grey, or RGB where the images have three channels."""
    weight = next((p.detach().float().cpu() for p in model.parameters() if p.ndim == 4), None)
    if weight is None:
        return
    weight = weight[:64]
    cols = min(len(weight), 8)
    rows = -(-len(weight) // cols)
    figure, axes = _figure(rows, cols, (cols, rows))
    limit = weight.abs().max()
    for index, ax in enumerate(axes.flat):
        ax.axis("off")
        if index >= len(weight):
            continue
        if weight.shape[1] == 3:
            ax.imshow((weight[index] / (2 * limit) + 0.5).permute(1, 2, 0).numpy())
        else:
            ax.imshow(weight[index].mean(0).numpy(), cmap="gray", vmin=-float(limit), vmax=float(limit))
    _save(figure, path)


def _figure(rows, cols, size):
    # Figure itself, not pyplot: needs no display and leaves the user's own plots alone
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, cols, squeeze=False)


def _save(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
