"""The papers' tables, for `dpmambair_basicsr.report`. Numbers are kept as printed."""

from dataclasses import dataclass, field

RGB = {'calculate_psnr': {'test_y_channel': False}, 'calculate_ssim': {'test_y_channel': False}}
LUMINANCE = {'calculate_psnr': {'test_y_channel': True}, 'calculate_ssim': {'test_y_channel': True}}
OTHER_SSIM, ON_Y = 'other SSIM', 'Y'
MARKS = {
    OTHER_SSIM: 'an SSIM whose definition the paper does not give, about 0.1 above calculate_ssim; not comparable '
    'with any other',
    ON_Y: 'measured on the Y channel; not comparable with RGB values',
}
SSIM_OF_DPMAMBAIR = {'calculate_ssim': OTHER_SSIM}


@dataclass(frozen=True)
class PublishedTable:
    """One table of a paper, or a part of it.

    Args:
        source: paper and table.
        settings: {metric: its arguments}, as far as the paper or its code gives them, in the order of the cells.
        sets: the columns, by the names of their test sets.
        text: one method per line: its name, then `|`, then one cell per set. The paper's own method is the last.
        marks: {method, or '*' for all others: {metric: key of MARKS}}: why its numbers deviate from `settings`.
    """

    source: str
    settings: dict[str, dict]
    sets: tuple[str, ...]
    text: str
    marks: dict[str, dict[str, str]] = field(default_factory=dict)

    def marks_of(self, method: str) -> dict[str, str]:
        """{metric: mark}"""
        return self.marks.get(method, self.marks.get('*', {}))

    def rows(self) -> dict[str, dict[str, dict[str, str]]]:
        """{method: {set: {metric: number as printed}}}"""
        rows = {}
        for line in self.text.strip().splitlines():
            method, _, cells = line.partition('|')
            rows[method.strip()] = {
                name: dict(zip(self.settings, cell.split('/'), strict=True))
                for name, cell in zip(self.sets, cells.split(), strict=True)
            }
        return rows


TABLES = (
    PublishedTable(
        # v1 names only the degradations; the test sets are those of Table III in v3.
        'DPMambaIR, arXiv 2504.17732v1, Table 1: all in one',
        RGB,
        ('LOL+LSRW', 'Snow100K', 'Rain100H', 'RESIDE6K', 'BSD400 JPEG', 'BSD400 noise', 'GoPro'),
        """
        MPRNet     | 19.71/0.659 30.94/0.938 26.27/0.912 25.63/0.947 30.51/0.938 28.03/0.897 26.07/0.869
        MIRNet     | 19.81/0.668 31.04/0.941 25.77/0.907 22.26/0.882 30.54/0.939 28.14/0.900 26.32/0.873
        NAFNet     | 19.49/0.650 30.33/0.935 26.04/0.906 25.63/0.946 30.20/0.936 27.80/0.895 26.13/0.870
        Restormer  | 19.99/0.670 31.67/0.944 26.91/0.919 26.18/0.953 30.56/0.939 28.17/0.890 26.62/0.880
        PromptIR   | 19.90/0.669 31.52/0.943 26.80/0.918 26.13/0.945 30.57/0.939 28.18/0.901 26.36/0.874
        IDR        | 19.68/0.663 31.16/0.941 26.39/0.914 26.11/0.948 30.51/0.939 28.10/0.899 26.29/0.873
        OneRestore | 19.77/0.657 29.95/0.931 25.37/0.900 27.74/0.962 30.10/0.934 27.65/0.890 25.90/0.866
        AdaIR      | 19.99/0.672 31.94/0.923 27.01/0.922 26.61/0.952 30.53/0.939 28.19/0.900 26.61/0.879
        DPMambaIR  | 20.04/0.680 32.36/0.949 27.07/0.926 28.13/0.963 30.57/0.939 28.25/0.902 27.43/0.894
        """,
        # v3 has NDR-Restore's 27.78 dB / 0.786 beside NAFNet's 27.80 / 0.895; calculate_ssim gives 0.784 at 27.78 dB.
        {'*': SSIM_OF_DPMAMBAIR},
    ),
    PublishedTable(
        'DPMambaIR, arXiv 2504.17732v1, Table 2: deraining alone',
        RGB,
        ('Rain100H',),
        """
        JORDER    | 26.25/0.835
        PReNet    | 29.46/0.899
        MPRNet    | 30.41/0.891
        MAXIM     | 30.81/0.903
        Restormer | 31.46/0.904
        DPMambaIR | 32.30/0.967
        """,
        # Published on Y: MPRNet's and Restormer's also in VmambaIR's Table 3.
        {'*': {'calculate_psnr': ON_Y, 'calculate_ssim': ON_Y}, 'DPMambaIR': SSIM_OF_DPMAMBAIR},
    ),
    PublishedTable(
        'DPMambaIR, arXiv 2504.17732v1, Table 2: low light alone',
        RGB,
        ('LOL',),
        """
        EnlightenGAN | 17.61/0.653
        MIRNet       | 24.14/0.830
        URetinex-Net | 19.84/0.824
        MAXIM        | 23.43/0.863
        IAT          | 23.38/0.809
        DPMambaIR    | 24.20/0.852
        """,
        {'DPMambaIR': SSIM_OF_DPMAMBAIR},
    ),
    PublishedTable(
        'DPMambaIR, arXiv 2504.17732v1, Table 2: deblurring alone',
        RGB,
        ('GoPro',),
        """
        DeepDeblur  | 29.08/0.913
        DeblurGAN   | 28.70/0.858
        DeblurGANv2 | 29.55/0.934
        MT-RNN      | 31.15/0.945
        IR-SDE      | 30.70/0.901
        DPMambaIR   | 31.42/0.948
        """,
        {'DPMambaIR': SSIM_OF_DPMAMBAIR},
    ),
    PublishedTable(
        'DPMambaIR, arXiv 2504.17732v1, Table 2: dehazing alone',
        RGB,
        ('RESIDE6K',),
        """
        GCANet        | 26.59/0.935
        GridDehazeNet | 25.86/0.944
        DehazeFormer  | 30.29/0.964
        MAXIM         | 29.12/0.932
        DA-CLIP       | 30.16/0.936
        DPMambaIR     | 30.89/0.977
        """,
        {'DPMambaIR': SSIM_OF_DPMAMBAIR},
    ),
    PublishedTable(
        'VmambaIR, arXiv 2403.11423, Table 1: single-image SR x4',
        {'calculate_lpips': {'net': 'alex', 'crop_border': 0}, 'calculate_psnr': LUMINANCE['calculate_psnr']},
        ('Manga109', 'Set14', 'General100', 'Urban100', 'DIV2K100'),
        """
        SFTGAN   | 0.0716/28.17 0.1313/26.74 0.0947/29.16 0.1343/24.34 0.1331/28.09
        SRGAN    | 0.0707/28.11 0.1327/26.84 0.0964/29.33 0.1439/24.41 0.1257/28.17
        ESRGAN   | 0.0649/28.41 0.1241/26.59 0.0879/29.43 0.1229/24.37 0.1154/28.18
        USRGAN   | 0.0630/28.75 0.1347/27.41 0.0937/30.00 0.1330/24.89 0.1325/28.79
        SPSR     | 0.0672/28.56 0.1207/26.86 0.0862/29.42 0.1184/24.80 0.1099/28.18
        BebyGAN  | 0.0529/29.19 0.1157/27.09 0.0778/29.95 0.1096/25.23 0.1022/28.62
        VmambaIR | 0.0496/29.99 0.1097/27.64 0.0762/30.34 0.1037/25.71 0.0995/29.18
        """,
    ),
    PublishedTable(
        'VmambaIR, arXiv 2403.11423, Table 2: real-world SR x4',
        {'calculate_lpips': {'net': 'vgg', 'crop_border': 0}, **LUMINANCE},
        ('NTIRE2020', 'AIM2019'),
        """
        ESRGAN      | 0.5938/21.14/0.3119 0.5558/23.17/0.6192
        BSRGAN      | 0.3691/26.75/0.7386 0.4048/24.20/0.6904
        Real-ESRGAN | 0.3471/26.40/0.7431 0.3956/23.89/0.6892
        SwinIR      | 0.3512/26.39/0.7414 0.3980/23.88/0.6905
        MM-RealSR   | 0.3446/25.19/0.7404 0.3948/23.05/0.6889
        VmambaIR    | 0.3379/27.06/0.7501 0.3891/23.90/0.6972
        """,
    ),
    PublishedTable(
        'VmambaIR, arXiv 2403.11423, Table 3: deraining',
        LUMINANCE,
        ('Rain100H', 'Rain100L', 'Test2800', 'Test1200'),
        """
        DerainNet | 14.92/0.592 27.03/0.884 24.31/0.861 23.38/0.835
        UMRL      | 26.01/0.832 29.18/0.923 29.97/0.905 30.55/0.910
        RESCAN    | 26.36/0.786 29.80/0.881 31.29/0.904 30.51/0.882
        PreNet    | 26.77/0.858 32.44/0.950 31.75/0.916 31.36/0.911
        MSPFN     | 28.66/0.860 32.40/0.933 32.82/0.930 32.39/0.916
        MPRNet    | 30.41/0.890 36.40/0.965 33.64/0.938 32.91/0.916
        SPAIR     | 30.95/0.892 36.93/0.969 33.34/0.936 33.04/0.922
        Restormer | 31.46/0.904 38.99/0.978 34.18/0.944 33.19/0.926
        VmambaIR  | 31.66/0.909 39.09/0.979 34.01/0.944 33.33/0.926
        """,
    ),
)
