"""The public datasets of the two papers: layouts of their downloads, and where our option files expect them.

The table for `prepare_data`. Each dataset gives the sources of its counts and layout, and what is our inference.
"DPMambaIR" (arXiv 2504.17732, v3, Table III) and "VmambaIR" (arXiv 2403.11423) refer to the papers. Layouts "from
public loaders" are taken from the data loaders and instructions of public repositories, and were not checked against
the downloads themselves.

A layout is a pair of patterns for the end of a path, without the file's extension: `{name}` matches any text within
one folder or file name, `{name:regex}` text of that form; the rest is literal, ignoring case. A GT image is the partner
of the LQ images that match it in all of its names, so several LQ images may share one.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from dpmambair_basicsr.files.image_folders import EXTENSIONS

_ENDING = rf'(?:{"|".join(map(re.escape, EXTENSIONS))})'


@dataclass(frozen=True)
class Layout:
    """Patterns of the GT and the LQ images; without LQ: clean images."""

    gt: str
    lq: str | None = None

    @property
    def patterns(self) -> list[str]:
        return [pattern for pattern in (self.lq, self.gt) if pattern]

    def __str__(self) -> str:
        return ' + '.join(self.patterns)


@dataclass(frozen=True)
class Part:
    """One split of a dataset, and its destination.

    Args:
        layouts: of the download; the first whose patterns all match is used.
        counts: published numbers of pairs (or clean images).
        gt, lq: folders of the result, below datasets/; lq None: GT images only.
        stem: names of the resulting files, from the names in the layout.
        subset: number of pairs used, evenly spaced in the order of names.
        make: 'bicubic': LQ images are downscaled by 4 if the layout has none. 'sub_images': tiles; with an lq folder,
            at several scales and with bicubic LQ tiles.
        scale: of GT to LQ.
    """

    layouts: tuple[Layout, ...]
    counts: tuple[int, ...]
    gt: str
    lq: str | None = None
    stem: str = '{key}'
    subset: int | None = None
    make: str = ''
    scale: int = 1


@dataclass(frozen=True)
class PublicSet:
    """A public dataset.

    Args:
        published: paper or site.
        facts: sources of counts and layout; what is inference.
        aliases: {link: folder}, further places below datasets/ where option files expect a result.
        lists: (file, folders): a text file of all images in these folders.
    """

    title: str
    published: str
    facts: str
    parts: dict[str, Part]
    aliases: dict[str, str] = field(default_factory=dict)
    lists: tuple[str, tuple[str, ...]] | None = None


def compile_pattern(pattern: str) -> re.Pattern:
    """The regular expression of a pattern, for whole paths.

    Raises:
        ValueError: a pattern without a name in braces, or an invalid one.
    """
    pieces = re.split(r'\{(\w+)(?::([^{}]+))?\}', pattern)
    expression = re.escape(pieces[0])
    for name, form, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        expression += f'(?P<{name}>{form or "[^/]+?"}){re.escape(text)}'
    try:
        compiled = re.compile(rf'(?:.*/)?{expression}{_ENDING}', re.IGNORECASE)
    except re.error as error:
        raise ValueError(f'pattern {pattern!r}: {error}') from error
    if not compiled.groupindex:
        raise ValueError(f'pattern {pattern!r} has no name in braces, such as {{key}}')
    return compiled


def find_names(pattern: str, paths: Iterable[str], problems: list[str]) -> dict[tuple, str]:
    """{((name, text), ...): path} of the matching paths; duplicates are added to the problems."""
    found, compiled = {}, compile_pattern(pattern)
    for path in sorted(paths):
        if match := compiled.fullmatch(path):
            names = tuple(sorted(match.groupdict().items()))
            if names in found:
                problems.append(f'two images of the same name: {found[names]} and {path}')
            found.setdefault(names, path)
    return found


def pair(layout: Layout, stem: str, paths: Iterable[str], problems: list[str]) -> dict[str, tuple[str | None, str]]:
    """{stem of the result: (LQ path or None, GT path)}, sorted. Images without partner are added to the problems."""
    gt = find_names(layout.gt, paths, problems)
    pairs, used = {}, set()
    if layout.lq is None:
        candidates = [(names, None, path) for names, path in gt.items()]
    else:
        gt_names = compile_pattern(layout.gt).groupindex
        candidates = []
        for names, path in find_names(layout.lq, paths, problems).items():
            partner = tuple((name, text) for name, text in names if name in gt_names)
            used.add(partner)
            if partner in gt:
                candidates.append((names, path, gt[partner]))
            else:
                problems.append(f'no GT image for {path}')
        problems += [f'no LQ image for {path}' for names, path in gt.items() if names not in used]
    for names, lq_path, gt_path in candidates:
        result = stem.format(**dict(names)).replace(' ', '_')  # lists of images are split at spaces
        if result in pairs:
            problems.append(f'two images for {result}: {pairs[result][1]} and {gt_path}')
        pairs.setdefault(result, (lq_path, gt_path))
    return dict(sorted(pairs.items()))


def spaced(stems: list[str], count: int) -> list[str]:
    """`count` of the stems, evenly spaced from the first on; all if there are fewer."""
    return [stems[index * len(stems) // count] for index in range(count)] if len(stems) > count else stems


def _rain_test(title: str, count: int, published: str, facts: str, *layouts: Layout, **kwargs) -> PublicSet:
    layouts = (Layout(f'{title}/target/{{key}}', f'{title}/input/{{key}}'), *layouts)
    return PublicSet(title, published, facts, {'test': Part(layouts, (count,), f'{title}/GT', f'{title}/LQ')}, **kwargs)


def _sr_test(title: str, count: int, published: str, facts: str, *layouts: Layout) -> PublicSet:
    layouts = (
        *layouts,
        Layout(f'{title}/image_SRF_4/{{key}}_SRF_4_HR', f'{title}/image_SRF_4/{{key}}_SRF_4_LR'),
        Layout(f'{title}/GTmod12/{{key}}', f'{title}/LRbicx4/{{key}}'),
        Layout(f'{title}/HR/{{key}}', f'{title}/LR_bicubic/X4/{{key}}x4'),
        Layout(f'{title}/HR/{{key}}'),
        Layout(f'{title}/{{key}}'),
    )
    part = Part(layouts, (count,), f'{title}/GT', f'{title}/LQ_x4', make='bicubic', scale=4)
    return PublicSet(title, published, f'{facts} {_SR_FACTS}', {'test': part})


_RAIN_FACTS = (
    'Layout {input,target}: the collection of MPRNet and Restormer, from public loaders; their instructions name the '
    'folders of the five test sets.'
)
_RAIN100_LAYOUTS = [
    layout
    for title in ('Rain100H', 'Rain100L')
    for layout in (
        Layout(f'{title}/norain-{{key}}', f'{title}/rainy/rain-{{key}}'),
        Layout(f'{title}/norain/norain-{{key}}', f'{title}/rain/rain-{{key}}'),
    )
]
_SR_FACTS = (
    'Layouts: the SelfExSR collection (image_SRF_4), the BasicSR collection (GTmod12, LRbicx4), the EDSR collection '
    '(HR, LR_bicubic), or HR images alone, from public loaders. LQ images are taken from the download if it has them, '
    'otherwise generated like MATLAB: bit for bit those of the first collection, as far as we could compare them.'
)
_OST_KINDS = 'animal|building|grass|mountain|plant|sky|water'
_ALL = 'all_in_one'

SETS = {
    'reside6k': PublicSet(
        'RESIDE-6K',
        'Li et al., RESIDE, TIP 2019; the subset of 6000 + 1000 pairs of Qin et al., FFA-Net, AAAI 2020, as DPMambaIR '
        'cites it',
        'Counts: DPMambaIR. Layout {train,test}/{hazy,GT}: from public loaders. Matching names: inference.',
        {
            split: Part(
                (Layout(f'{split}/GT/{{key}}', f'{split}/hazy/{{key}}'),),
                (count,),
                f'{_ALL}/{split}/haze/GT',
                f'{_ALL}/{split}/haze/LQ',
            )
            for split, count in (('train', 6000), ('test', 1000))
        },
    ),
    'rain13k': PublicSet(
        'Rain13K',
        'Jiang et al., MSPFN, CVPR 2020; collection of Zamir et al., MPRNet, CVPR 2021',
        'Count: 13711 in DPMambaIR and in the download; the MPRNet paper says 13712, of which its authors removed one '
        f'image of a wrong size. {_RAIN_FACTS}',
        {
            'train': Part(
                (
                    Layout('Rain13K/target/{key}', 'Rain13K/input/{key}'),
                    Layout('train/target/{key}', 'train/input/{key}'),
                ),
                (13711, 13712),
                'Rain13K/GT',
                'Rain13K/LQ',
            )
        },
        aliases={f'{_ALL}/train/rain': 'Rain13K'},
    ),
    'rain100h': _rain_test(
        'Rain100H',
        100,
        'Yang et al., CVPR 2017',
        f'Count: DPMambaIR. {_RAIN_FACTS} Layout rain-001 + norain-001: from public loaders.',
        *_RAIN100_LAYOUTS[:2],
        aliases={f'{_ALL}/test/rain': 'Rain100H'},
    ),
    'rain100l': _rain_test(
        'Rain100L',
        100,
        'Yang et al., CVPR 2017',
        f'Count: the name. {_RAIN_FACTS} Layout rain-001 + norain-001: from public loaders.',
        *_RAIN100_LAYOUTS[2:],
    ),
    'test100': _rain_test(
        'Test100',
        98,
        'Zhang et al., ID-CGAN, TCSVT 2019; collection of Zamir et al., MPRNet, CVPR 2021',
        f'Count: 98, according to the authors of MPRNet, of their download; their paper says 100. {_RAIN_FACTS} None '
        'of our option files uses this set.',
    ),
    'test1200': _rain_test(
        'Test1200',
        1200,
        'Zhang and Patel, DID-MDN, CVPR 2018; collection of Zamir et al., MPRNet, CVPR 2021',
        f'Count: the name. {_RAIN_FACTS} The original download, with both images of a pair in one, is not supported.',
    ),
    'test2800': PublicSet(
        'Test2800',
        'Fu et al., DDN, CVPR 2017 (its testing split); collection of Zamir et al., MPRNet, CVPR 2021',
        f'Count: the name. {_RAIN_FACTS} An early version of that download had a second copy 926_10(1).jpg, which is '
        'reported as an image without partner. Layout rainy_image/1_1 + ground_truth/1: from public loaders.',
        {
            'test': Part(
                (
                    Layout('Test2800/target/{scene}_{key}', 'Test2800/input/{scene}_{key}'),
                    Layout('testing/ground_truth/{scene}', 'testing/rainy_image/{scene}_{key}'),
                ),
                (2800,),
                'Test2800/GT',
                'Test2800/LQ',
                stem='{scene}_{key}',
            )
        },
    ),
    'snow100k': PublicSet(
        'Snow100K, a subset',
        'Liu et al., DesnowNet, TIP 2018',
        'Counts: the paper and public loaders (50000 for training; for testing S 16611, M 16588, L 16801, together '
        '50000; one loader reports 49999 for training, which is accepted). Layout all/{synthetic,gt}, '
        'Snow100K-L/{synthetic,gt}: from public loaders. DPMambaIR uses 5000 and 1000 pairs and does not say which: '
        'evenly spaced ones, in the order of names, are our choice; select others with --subset.',
        {
            'train': Part(
                (
                    Layout('all/gt/{key}', 'all/synthetic/{key}'),
                    Layout('Snow100K-training/gt/{key}', 'Snow100K-training/synthetic/{key}'),
                ),
                (50000, 49999),
                f'{_ALL}/train/snow/GT',
                f'{_ALL}/train/snow/LQ',
                subset=5000,
            ),
            'test': Part(
                (Layout('Snow100K-{size:[SML]}/gt/{key}', 'Snow100K-{size:[SML]}/synthetic/{key}'),),
                (50000,),
                f'{_ALL}/test/snow/GT',
                f'{_ALL}/test/snow/LQ',
                stem='{size}_{key}',
                subset=1000,
            ),
        },
    ),
    'lol': PublicSet(
        'LOL',
        'Wei et al., BMVC 2018',
        'Counts: the paper; with LSRW they make the 6085 and 65 of DPMambaIR. Layout: from public loaders. Shares its '
        'folders with LSRW, so names begin with lol_.',
        {
            split: Part(
                (Layout(f'{folder}/high/{{key}}', f'{folder}/low/{{key}}'),),
                (count,),
                f'{_ALL}/{split}/lowlight/GT',
                f'{_ALL}/{split}/lowlight/LQ',
                stem='lol_{key}',
            )
            for split, folder, count in (('train', 'our485', 485), ('test', 'eval15', 15))
        },
    ),
    'lsrw': PublicSet(
        'LSRW',
        'Hai et al., R2RNet, JVCIR 2023',
        'Counts: 5600 and 50 follow from the 6085 and 65 of DPMambaIR minus LOL (inference). Layout: from public '
        "loaders. An issue in its authors' repository reports Huawei images whose names in low and high differ; if "
        'your download has them, --skip-bad --any-count skips them.',
        {
            split: Part(
                (
                    Layout(
                        f'{folder}/{{camera:Huawei|Nikon}}/high/{{key}}',
                        f'{folder}/{{camera:Huawei|Nikon}}/low/{{key}}',
                    ),
                ),
                (count,),
                f'{_ALL}/{split}/lowlight/GT',
                f'{_ALL}/{split}/lowlight/LQ',
                stem='lsrw_{camera}_{key}',
            )
            for split, folder, count in (('train', 'Training data', 5600), ('test', 'Eval', 50))
        },
    ),
    'gopro': PublicSet(
        'GoPro',
        'Nah et al., CVPR 2017 (GOPRO_Large)',
        'Counts: DPMambaIR. Layout {train,test}/<sequence>/{blur,sharp}: from public loaders; blur_gamma is '
        'skipped. Layout {input,target}: the collection of MPRNet and Restormer (inference).',
        {
            split: Part(
                (
                    Layout(f'{split}/{{sequence}}/sharp/{{key}}', f'{split}/{{sequence}}/blur/{{key}}'),
                    Layout(f'{split}/GoPro/target/{{sequence}}-{{key}}', f'{split}/GoPro/input/{{sequence}}-{{key}}'),
                    Layout(f'{split}/target/{{sequence}}-{{key}}', f'{split}/input/{{sequence}}-{{key}}'),
                ),
                (count,),
                f'{_ALL}/{split}/blur/GT',
                f'{_ALL}/{split}/blur/LQ',
                stem='{sequence}-{key}',
            )
            for split, count in (('train', 2103), ('test', 1111))
        },
    ),
    'waterlooed': PublicSet(
        'WaterlooED',
        'Ma et al., Waterloo Exploration Database, TIP 2017',
        'Count: DPMambaIR. Layout pristine_images: from public loaders. Clean images; noise and JPEG are added by '
        'SyntheticDegradationDataset. The download is a rar archive: unpack it first.',
        {'train': Part((Layout('pristine_images/{key}'),), (4744,), f'{_ALL}/train/clean')},
    ),
    'bsd400': PublicSet(
        'BSD400',
        'Martin et al., ICCV 2001; BSDS500 of Arbelaez et al., TPAMI 2011',
        'Count: DPMambaIR. The 200 + 200 colour images of the train and test folders of BSDS500: inference from the '
        'usual meaning of the name. Clean images, like WaterlooED.',
        {
            'test': Part(
                (Layout('BSD400/{key}'), Layout('BSDS500/data/images/{split:train|test}/{key}')),
                (400,),
                f'{_ALL}/test/clean',
            )
        },
    ),
    'df2k': PublicSet(
        'DF2K',
        'Agustsson and Timofte, DIV2K, CVPRW 2017; Lim et al., EDSR, CVPRW 2017 (Flickr2K)',
        'Counts: VmambaIR (800 and 2650). Layouts: from public loaders. Scales 1, 0.75, 0.5, 1/3 and short side 400 '
        '(Lanczos) are those of the preparation of Real-ESRGAN; including the original scale is inference from its '
        'list of files. Tiles of 480, 240 apart, are the default of its cropping script and of BasicSR. LQ tiles come '
        'from the whole image, downscaled by 4 (bicubic; inference). An image smaller than a tile is kept.',
        {
            name: Part(
                tuple(map(Layout, layouts)),
                (count,),
                'DF2K/GT_sub',
                'DF2K/LQ_x4_sub',
                make='sub_images',
                stem=stem,
                scale=4,
            )
            for name, layouts, count, stem in (
                ('div2k', ['DIV2K_train_HR/{key}'], 800, 'div2k_{key}'),
                ('flickr2k', ['Flickr2K_HR/{key}', 'Flickr2K/{key}'], 2650, 'flickr2k_{key}'),
            )
        },
        aliases={'DF2K_OST/DF2K': 'DF2K/GT_sub'},
        lists=('DF2K_OST/meta_info.txt', ('DF2K_OST/DF2K', 'DF2K_OST/OST')),
    ),
    'ost': PublicSet(
        'OST',
        'Wang et al., SFT-GAN, CVPR 2018 (OutdoorSceneTrain_v2)',
        'Count: 10324, from memory of the paper, not checked. Layout, one folder or archive for each of the seven '
        'kinds: inference from public loaders. Tiles like DF2K, at the original scale.',
        {
            'train': Part(
                (Layout(f'{{kind:{_OST_KINDS}}}/{{key}}'),),
                (10324,),
                'DF2K_OST/OST',
                make='sub_images',
                stem='{kind}_{key}',
            )
        },
        lists=('DF2K_OST/meta_info.txt', ('DF2K_OST/DF2K', 'DF2K_OST/OST')),
    ),
    'set14': _sr_test('Set14', 14, 'Zeyde et al., 2010', 'Count: the name.'),
    'general100': _sr_test('General100', 100, 'Dong et al., FSRCNN, ECCV 2016', 'Count: the name.'),
    'urban100': _sr_test('Urban100', 100, 'Huang et al., SelfExSR, CVPR 2015', 'Count: the name.'),
    'manga109': _sr_test('Manga109', 109, 'Matsui et al., 2017', 'Count: the name.'),
    'div2k100': _sr_test(
        'DIV2K100',
        100,
        'Agustsson and Timofte, DIV2K, CVPRW 2017, the validation images',
        'Count: the paper. Use of the validation images by VmambaIR: inference.',
        Layout('DIV2K_valid_HR/{key}', 'DIV2K_valid_LR_bicubic/X4/{key}x4'),
        Layout('DIV2K_valid_HR/{key}'),
    ),
    'ntire2020': PublicSet(
        'NTIRE2020',
        'Lugmayr et al., NTIRE 2020 challenge on real-world super-resolution, track 1, validation',
        'Use of the validation images of track 1: the option files of VmambaIR name track1-valid-input. Count: 100 in '
        'public loaders. Layouts: from public loaders; matching names in both folders: inference.',
        {
            'test': Part(
                tuple(
                    Layout(gt, lq)
                    for gt in ('track1-valid-gt/{key}', 'DIV2K_valid_HR/{key}')
                    for lq in ('track1-valid-input/{key}', 'Corrupted-va-x/{key}')
                ),
                (100,),
                'NTIRE2020/GT',
                'NTIRE2020/LQ_x4',
                scale=4,
            )
        },
    ),
    'aim2019': PublicSet(
        'AIM2019',
        'Lugmayr et al., AIM 2019 challenge on real-world super-resolution, track 2, validation',
        'Layout: option files, of VmambaIR among others. The count of 100 and matching names in both folders: '
        'inference.',
        {
            'test': Part(
                (Layout('valid-gt-clean/{key}', 'valid-input-noisy/{key}'),),
                (100,),
                'AIM2019/GT',
                'AIM2019/LQ_x4',
                scale=4,
            )
        },
    ),
}
