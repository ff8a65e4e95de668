import cv2

from dpmambair_basicsr.patches.registry import replaces

WINDOW = cv2.getGaussianKernel(11, 1.5)  # (11, 1), float64; the window is its outer product with itself
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@replaces('basicsr.metrics.psnr_ssim', '_ssim')
def separable_ssim(original):
    """Filters for SSIM four times, with separable kernels: equal up to rounding, in a half to a quarter of the time.

    Fixes: `_ssim` filters five times with 11 x 11 kernels.
    Remove once: BasicSR's window is separable.
    """

    def ssim(img, img2):
        """Mean over the (h - 10, w - 10) whole windows of two (h, w) float64 images in [0, 255]."""
        mean, mean2 = filtered(img), filtered(img2)
        squares, product = mean * mean + mean2 * mean2, mean * mean2
        variances = filtered(img * img + img2 * img2) - squares  # their sum
        covariance = filtered(img * img2) - product
        similarity = (2 * product + C1) * (2 * covariance + C2) / ((squares + C1) * (variances + C2))
        return similarity.mean()

    return ssim


def filtered(image):
    return cv2.sepFilter2D(image, -1, WINDOW, WINDOW)[5:-5, 5:-5]
