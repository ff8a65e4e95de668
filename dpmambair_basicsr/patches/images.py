"""Patches of image reading and writing in BasicSR's own datasets and models; ours call `files/codec` directly."""

from pathlib import Path

from dpmambair_basicsr.files.codec import check_size, write_image
from dpmambair_basicsr.files.regular import check_regular
from dpmambair_basicsr.patches.registry import replaces

DATASETS = ('ffhq', 'paired_image', 'realesrgan', 'realesrgan_paired', 'reds', 'single_image', 'vimeo90k')
MODELS = ('sr', 'hifacegan', 'stylegan2', 'video_base', 'video_recurrent')  # those that import imwrite by name


def header_first(original):
    """Checks the size in an image's header, and rejects images with too many pixels before decoding.

    Fixes: `imfrombytes` decodes first: 124 kB of PNG can expand to 32000 x 32000 pixels, which take 6.5 GB.
    Remove once: BasicSR or OpenCV has a limit that suits training.
    """

    def imfrombytes(content, *arguments, **keywords):
        check_size(content or b'')
        return original(content, *arguments, **keywords)

    return imfrombytes


def whole_images(original):
    """Writes an image atomically, or raises.

    Fixes: `imwrite` on a full disk leaves files of 0 bytes, and the exit status is 0.
    Remove once: BasicSR checks the result, and renames complete files.
    """

    def imwrite(img, file_path, params=None, auto_mkdir=True):
        if auto_mkdir:
            Path(file_path).parent.mkdir(parents=True, exist_ok=True)
        write_image(file_path, img, params)

    return imwrite


for name in DATASETS:
    replaces(f'basicsr.data.{name}_dataset', 'imfrombytes')(header_first)
for name in MODELS:
    replaces(f'basicsr.models.{name}_model', 'imwrite')(whole_images)


@replaces('basicsr.utils.file_client:HardDiskBackend', 'get')
def regular_files(original):
    """Opens regular files only.

    Fixes: `HardDiskBackend.get` blocks forever on a FIFO in place of an image, and reads /dev/zero until memory
        runs out.
    Remove once: BasicSR checks what it opens.
    """

    def get(self, filepath):
        check_regular(filepath)
        return original(self, filepath)

    return get
