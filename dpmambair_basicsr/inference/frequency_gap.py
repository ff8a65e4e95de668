"""Where in the spectrum restored images differ from the clean ones (DPMambaIR v1, Fig. 5)."""

import numpy as np

RINGS = 32


def ring_means(values: np.ndarray) -> np.ndarray:
    """(H, W, C) over the frequencies of `np.fft.fft2` -> (RINGS,), means over rings from 0 to 0.5 cycles per pixel.

    Frequencies beyond 0.5, in the corners, are left out; rings of small images may be empty: NaN.
    """
    frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, values.shape[:2]), indexing='ij'))
    ring = np.floor(frequency * 2 * RINGS).astype(int)
    inside = ring < RINGS
    sums = np.bincount(ring[inside], values.mean(axis=2)[inside], RINGS)
    counts = np.bincount(ring[inside], minlength=RINGS)
    return np.divide(sums, counts, out=np.full(RINGS, np.nan), where=counts > 0)


def spectrum(image: np.ndarray) -> np.ndarray:
    """(H, W, C) -> complex spectrum of each channel, with a Hann window, without which borders look like edges."""
    window = np.outer(*map(np.hanning, image.shape[:2]))[..., None]
    return np.fft.fft2((image - image.mean(axis=(0, 1))) * window, axes=(0, 1))


def amplitudes(clean: np.ndarray, restored: np.ndarray) -> np.ndarray:
    """(H, W, C) floats of the same scale -> (3, RINGS): mean amplitudes of clean, restored and difference."""
    wanted, found = spectrum(clean), spectrum(restored)
    return np.stack([ring_means(np.abs(part)) for part in (wanted, found, wanted - found)])


def frequency_gap(images: list[np.ndarray]) -> np.ndarray:
    """How much amplitude is missing in each ring of frequencies, and how much differs, over several images.

    The paper shows "frequency-domain differences" of clear and restored images and gives no formula: both are ours.

    Args:
        images: the result of `amplitudes` for each image.

    Returns:
        (2, RINGS): 20 log10 of the mean amplitude of the clean images divided by that of the restored ones, in dB,
        positive where the latter have less; the mean amplitude of the differences divided by that of the clean images.
    """
    clean, restored, difference = np.mean(images, axis=0)
    clean, restored = (np.maximum(part, np.finfo(float).tiny) for part in (clean, restored))
    return np.stack([20 * np.log10(clean / restored), difference / clean])
