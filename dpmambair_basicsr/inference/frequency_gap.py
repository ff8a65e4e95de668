"""Where in the spectrum restored images differ from the clean ones (DPMambaIR v1, Fig. 5)."""

import numpy as np

RINGS = 32


def ring_means(values: np.ndarray) -> np.ndarray:
    """(H, W, C) over the frequencies of `np.fft.fft2` -> (RINGS,), means over rings from frequency 0 to 0.5 per pixel.

    Frequencies beyond 0.5, those of the corners, are left out; of a small image rings may be empty: NaN.
    """
    frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, values.shape[:2]), indexing='ij'))
    ring = np.floor(frequency * 2 * RINGS).astype(int)
    inside = ring < RINGS
    sums = np.bincount(ring[inside], values.mean(axis=2)[inside], RINGS)
    counts = np.bincount(ring[inside], minlength=RINGS)
    return np.divide(sums, counts, out=np.full(RINGS, np.nan), where=counts > 0)


def spectrum(image: np.ndarray) -> np.ndarray:
    """(H, W, C) -> the same, complex: of each channel under a Hann window, without which borders look like edges."""
    window = np.outer(*map(np.hanning, image.shape[:2]))[..., None]
    return np.fft.fft2((image - image.mean(axis=(0, 1))) * window, axes=(0, 1))


def amplitudes(clean: np.ndarray, restored: np.ndarray) -> np.ndarray:
    """(H, W, C) floats of one scale -> (3, RINGS): mean amplitudes of clean, restored and difference."""
    wanted, found = spectrum(clean), spectrum(restored)
    return np.stack([ring_means(np.abs(part)) for part in (wanted, found, wanted - found)])


def frequency_gap(images: list[np.ndarray]) -> np.ndarray:
    """How much of each ring of frequencies is missing, and how much of it differs, over several images.

    The paper shows "frequency-domain differences" of clear and restored images and gives no formula: both are ours.

    Args:
        images: of each, what `amplitudes` returns.

    Returns:
        (2, RINGS): 20 log10 of the mean amplitude of clean images over that of the restored ones, in dB, positive where
        these have less; the mean amplitude of the differences over that of the clean images.
    """
    clean, restored, difference = np.mean(images, axis=0)
    clean, restored = (np.maximum(part, np.finfo(float).tiny) for part in (clean, restored))
    return np.stack([20 * np.log10(clean / restored), difference / clean])
