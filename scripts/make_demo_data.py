"""Generate the demo's degraded and clean images from photographs in scikit-image and scikit-learn; no downloads.

    python scripts/make_demo_data.py --output datasets/demo

Writes train/clean/*.png (tiles, to be degraded on the fly), test/<degradation>/{LQ,GT}/<photo>.png and demo.json.
No test photograph is in the training set. The test images are degraded as strongly as the training images, with
`degradations: demo` of the demo's option files. The same arguments give the same files; a complete set is kept, a set
made by this script with other arguments is replaced.
"""

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
import skimage
import sklearn
from tqdm import tqdm

from dpmambair_basicsr.data.degradations import DEGRADATIONS, degrade, demo_strengths, to_uint8

PHOTOGRAPHS = Path(skimage.__file__).parent / 'data', Path(sklearn.__file__).parent / 'datasets' / 'images'
TEST = ('chelsea.png', 'coffee.png', 'flower.jpg')
TRAIN = (
    'astronaut.png',
    'camera.png',
    'china.jpg',
    'coins.png',
    'hubble_deep_field.jpg',
    'ihc.png',
    'motorcycle_left.png',
    'motorcycle_right.png',
    'retina.jpg',
    'rocket.jpg',
)
STRENGTH = demo_strengths()


def read(name: str) -> np.ndarray:
    """(H, W, 3) RGB uint8."""
    for folder in PHOTOGRAPHS:
        if (folder / name).is_file():
            return cv2.imread(str(folder / name), cv2.IMREAD_COLOR)[..., ::-1]
    raise FileNotFoundError(
        f'{name} is in neither {PHOTOGRAPHS[0]} nor {PHOTOGRAPHS[1]}: reinstall scikit-image and scikit-learn'
    )


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image[..., ::-1]):
        raise OSError(f'cannot write {path}')


def shrink(image: np.ndarray, short_side: int) -> np.ndarray:
    factor = short_side / min(image.shape[:2])
    if factor > 1:
        return image
    size = round(image.shape[1] * factor), round(image.shape[0] * factor)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def tiles(image: np.ndarray, size: int) -> list[np.ndarray]:
    """Squares that cover the image, evenly spaced; they overlap where a side is not a multiple of `size`."""
    size = min(size, *image.shape[:2])
    tops, lefts = (np.linspace(0, side - size, math.ceil(side / size)).round().astype(int) for side in image.shape[:2])
    return [image[top : top + size, left : left + size] for top in tops for left in lefts]


def make(folder: Path, size: int) -> dict[str, float]:
    """Fill the folder; return the mean PSNR of the degraded test images in dB."""
    psnr = {}
    with tqdm(total=len(TRAIN) + len(TEST) * len(STRENGTH), desc='demo data', unit='image') as progress:
        for name in TRAIN:
            photo = read(name)
            for scale, short_side in enumerate((2 * size, size)):  # the same content at two sizes: more variety
                for number, tile in enumerate(tiles(shrink(photo, short_side), size)):
                    write(folder / 'train' / 'clean' / f'{Path(name).stem}_{scale}_{number}.png', tile)
            progress.update()
        for kind, strength in STRENGTH.items():
            errors = []
            for number, name in enumerate(TEST):
                photo = shrink(read(name), size)
                top, left = (photo.shape[0] - size) // 2, (photo.shape[1] - size) // 2
                clean = photo[top : top + size, left : left + size]
                rng = np.random.default_rng([DEGRADATIONS[kind].label, number])
                degraded = to_uint8(degrade(clean.astype(np.float32) / 255, kind, rng, **strength))
                write(folder / 'test' / kind / 'GT' / f'{Path(name).stem}.png', clean)
                write(folder / 'test' / kind / 'LQ' / f'{Path(name).stem}.png', degraded)
                errors.append(np.mean((clean.astype(np.float64) - degraded) ** 2))
                progress.update()
            psnr[kind] = float(np.mean(10 * np.log10(255**2 / np.array(errors))))
    return psnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, default=Path('datasets/demo'))
    parser.add_argument('--size', type=int, default=256, help='side of the test images and training tiles, 64 to 300')
    args = parser.parse_args()
    if not 64 <= args.size <= 300:
        parser.error(f'--size must be in [64, 300], got {args.size}')  # 300: the smallest test photograph

    manifest = args.output / 'demo.json'
    recipe = {'size': args.size, 'train': TRAIN, 'test': TEST, 'strength': STRENGTH}
    recipe = json.loads(json.dumps(recipe))  # tuples become lists, as when it is read back
    made = json.loads(manifest.read_text(encoding='utf-8')) if manifest.is_file() else {}
    complete = made.get('recipe') == recipe and all((args.output / name).is_file() for name in made['files'])
    if complete:
        print(f'{args.output} is complete.')
    else:
        if args.output.exists() and not made and any(args.output.iterdir()):
            raise SystemExit(f'{args.output} exists and was not created by this script; choose another --output')
        args.output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a single rename and an interruption leaves no partial set.
        temporary = Path(tempfile.mkdtemp(prefix=f'.{args.output.name}-', dir=args.output.parent))
        try:
            psnr = make(temporary, args.size)
            files = sorted(str(path.relative_to(temporary)) for path in temporary.rglob('*.png'))
            made = {'recipe': recipe, 'psnr': psnr, 'files': files}
            (temporary / 'demo.json').write_text(json.dumps(made, indent=1), encoding='utf-8')
            temporary.chmod(0o755)  # mkdtemp makes it private
            shutil.rmtree(args.output, ignore_errors=True)
            temporary.rename(args.output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    training = sum(name.startswith('train') for name in made['files'])
    print(f'{args.output}: {training} clean training tiles, {len(TEST)} test photographs x {len(STRENGTH)} kinds')
    print(f'{"degradation":<12} input PSNR (dB)')
    for kind, value in made['psnr'].items():
        print(f'{kind:<12} {value:.2f}')


if __name__ == '__main__':
    main()
