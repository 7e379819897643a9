"""Read an image file of any usual kind into a small uint8 tensor, or say in one sentence what is wrong with it."""

import warnings
from pathlib import Path

import numpy as np
import torch


def read_image(path, channels, size):
    """Read an image file, turned upright, as uint8 [channels, size, size].

    The largest centred square is cut out and resized (bilinear, antialiased). Transparent pixels become white, 16-bit
    grey becomes 8-bit, of an animation the first frame is taken, EXIF rotation is applied.

    Args:
        path: PNG, JPEG or anything else Pillow reads.
        channels: 1 for grey, 3 for RGB.
        size: height and width of the result.

    Raises:
        ValueError: the file is missing, empty, truncated, not an image, or claims an absurd size; the message names it.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            image.load()
            image = ImageOps.exif_transpose(image)
            image = _eight_bit(image, "L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    except UnidentifiedImageError as error:
        what = "is not an image of a known kind" if path.stat().st_size else "is empty (0 bytes)"
        raise ValueError(f"{path} {what}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} claims more than {Image.MAX_IMAGE_PIXELS} pixels and was not decoded") from error
    except _Unsuited as error:
        raise ValueError(f"{path} {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, IndexError and more on corrupt files
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.view(size, size, channels).permute(2, 0, 1).contiguous()


class _Unsuited(Exception):
    pass


def _eight_bit(image, mode):
    from PIL import Image

    if image.mode.startswith("I"):
        # Pillow's own conversion of 16-bit grey clips everything above 255
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "F":
        raise _Unsuited("holds floating-point pixels, which have no fixed range; save it as 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
