"""Table and picture of the demo: gain of the network per degradation, and accuracy of its extractor.

Reads datasets/demo, results/demo_test_dpmambair and the checkpoint of experiments/demo_degradation_extractor; writes
results/demo/table.md and results/demo/comparison.png.
"""

from pathlib import Path

import dpmambair_basicsr  # noqa: F401  (before basicsr: it makes BasicSR importable, and registers our networks)

# isort: split
import cv2
import numpy as np
import torch
import yaml
from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import img2tensor
from torch.nn import functional as F
from tqdm import tqdm

from dpmambair_basicsr.data.degradations import degrade, demo_strengths
from dpmambair_basicsr.results.run import markdown_table

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / 'datasets' / 'demo'
RESTORED = ROOT / 'results' / 'demo_test_dpmambair' / 'visualization'
OUTPUT = ROOT / 'results' / 'demo'
VERSIONS_PER_PHOTO = 8  # of each degradation, for the accuracy of the extractor


def main() -> None:
    rows, pictures = [], []
    kinds = tested_kinds()
    for kind in tqdm(kinds, desc='PSNR and SSIM', unit='set'):
        triples = read_triples(kind)
        before = np.mean([measure(lq, gt) for lq, _, gt in triples], axis=0)
        after = np.mean([measure(restored, gt) for _, restored, gt in triples], axis=0)
        rows.append((before, after))
        pictures.append(triples[len(rows) % len(triples)])
    accuracy, count = extractor_accuracy()
    footer = (
        f'Stage 1 alone names the degradation of {accuracy:.0%} of {count} images made from photographs it never saw '
        f'(nearest mean of the embeddings of the training photographs; chance: {1 / len(demo_strengths()):.0%}).'
    )
    report = f'{table(kinds, rows)}\n\n{footer}'
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / 'table.md').write_text(report + '\n', encoding='utf-8')
    cv2.imwrite(str(OUTPUT / 'comparison.png'), comparison(kinds, pictures))
    print(f'\n{report}\n\nPicture: {OUTPUT.relative_to(ROOT) / "comparison.png"}')


def tested_kinds() -> list[str]:
    """The sets in the option file of the demo's test, named after their degradations."""
    opt = yaml.safe_load((ROOT / 'options' / 'demo_test_dpmambair.yml').read_text(encoding='utf-8'))
    return [dataset['degradation'] for dataset in opt['datasets'].values()]


def read_triples(kind: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(degraded, restored, truth), HWC BGR uint8, of each test photograph."""
    triples = []
    for path in sorted((DATA / 'test' / kind / 'GT').glob('*.png')):
        (restored,) = (RESTORED / kind).glob(f'{path.stem}_*.png')
        files = DATA / 'test' / kind / 'LQ' / path.name, restored, path
        triples.append(tuple(cv2.imread(str(file)) for file in files))
    return triples


def measure(image: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    return calculate_psnr(image, truth, crop_border=0), calculate_ssim(image, truth, crop_border=0)


def table(kinds: list[str], rows: list[tuple[np.ndarray, np.ndarray]]) -> str:
    def cells(name, before, after):
        return name, *(f'{psnr:.2f} / {ssim:.3f}' for psnr, ssim in (before, after)), f'{after[0] - before[0]:+.2f} dB'

    header = ('degradation', 'input PSNR / SSIM', 'restored PSNR / SSIM', 'gain')
    named = zip([*kinds, 'average'], [*rows, np.mean(rows, axis=0)], strict=True)
    return markdown_table(header, [cells(name, *pair) for name, pair in named])


def extractor_accuracy() -> tuple[float, int]:
    """Share of images whose embedding is nearest to the mean of their own degradation, and the number of images.

    Distances are in units of each coordinate's standard deviation over the training images.
    """
    opt = yaml.safe_load((ROOT / 'options' / 'demo_degradation_extractor.yml').read_text(encoding='utf-8'))
    strengths = demo_strengths()
    net = build_network(opt['network_g'])
    weights = ROOT / 'experiments' / opt['name'] / 'models' / 'net_g_latest.pth'
    net.load_state_dict(torch.load(weights, map_location='cpu', weights_only=True)['params'])
    extractor = net.extractor.merge().eval()

    def embed(paths: list[Path], versions: int, description: str) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, labels = [], []
        for path in tqdm(paths, desc=description, unit='image'):
            clean = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB).astype(np.float32) / 255
            for label, (kind, strength) in enumerate(strengths.items()):
                for version in range(versions):
                    rng = np.random.default_rng([len(labels), version])
                    image = img2tensor(degrade(clean, kind, rng, **strength), bgr2rgb=False)
                    with torch.no_grad():
                        embeddings.append(F.normalize(extractor(image[None])[0], dim=0))
                    labels.append(label)
        return torch.stack(embeddings), torch.tensor(labels)

    train, train_labels = embed(sorted((DATA / 'train' / 'clean').glob('*.png')), 1, 'class means')
    unseen = sorted((DATA / 'test' / next(iter(strengths)) / 'GT').glob('*.png'))
    test, test_labels = embed(unseen, VERSIONS_PER_PHOTO, 'unseen photographs')
    deviation = train.std(dim=0).clamp(min=1e-6)
    means = torch.stack([train[train_labels == label].mean(dim=0) for label in range(len(strengths))])
    nearest = torch.cdist(test / deviation, means / deviation).argmin(dim=1)
    return (nearest == test_labels).float().mean().item(), len(test)


def comparison(kinds: list[str], pictures: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """One column per degradation; rows: degraded, restored, truth."""
    header = 28
    columns = []
    for kind, images in zip(kinds, pictures, strict=True):
        title = np.full((header, images[0].shape[1], 3), 255, np.uint8)
        cv2.putText(title, kind, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
        columns.append(np.vstack([title, *images]))
    side = np.full((columns[0].shape[0], header, 3), 255, np.uint8)
    height = pictures[0][0].shape[0]
    for row, label in enumerate(('degraded', 'restored', 'truth')):
        text = np.full((header, height, 3), 255, np.uint8)
        cv2.putText(text, label, (height // 2 - 40, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
        top = header + row * height
        side[top : top + height] = cv2.rotate(text, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return np.hstack([side, *columns])


if __name__ == '__main__':
    main()
