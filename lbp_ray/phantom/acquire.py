"""From signal to stored pixels: coil, saturation band, grain, band-limited k-space with complex noise, magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import fft
from scipy.special import expit

from lbp_ray.phantom.grid import enlarge, spread

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lbp_ray.phantom.anatomy import Anatomy
    from lbp_ray.phantom.surround import Surround

    Field = NDArray[np.float32]

FULL_SCALE = 4095
"""Largest value of the 12 stored bits."""

ACQUIRED = (0.70, 0.88)
"""Share of k-space rows and columns that is acquired; the rest is filled with zeros, as the scanner does."""


@dataclass(frozen=True)
class Receiver:
    """What the scanner does to every slice of a series alike."""

    sensitivity: Field
    window: Field
    noise: float

    def acquire(self, signal: Field, rng: np.random.Generator) -> Field:
        """Image a slice: sensitivity, k-space window, complex Gaussian noise, magnitude.

        Parameters
        ----------
        signal
            Shape (rows, columns), float32, signal for a uniform coil.
        rng
            Noise stream.

        Returns
        -------
        numpy.ndarray
            Shape (rows, columns), float32 magnitude: Rician noise.
        """
        image = fft.ifft2(self.kspace(signal, rng), overwrite_x=True)
        return np.asarray(np.sqrt(image.real**2 + image.imag**2))

    def kspace(self, signal: Field, rng: np.random.Generator) -> NDArray[np.complex64]:
        """Noisy k-space of a slice, zero frequency first, complex64: what a faster scan would sample less of."""
        data: NDArray[np.complex64] = fft.fft2(signal * self.sensitivity)
        scale = np.float32(self.noise * np.sqrt(signal.size))
        kept = int(np.ceil((ACQUIRED[0] + 0.09) * len(signal) / 2))
        data[kept:-kept] = 0
        for rows in (slice(None, kept), slice(-kept, None)):
            noise = rng.standard_normal((kept, signal.shape[1], 2), np.float32)
            noise *= scale
            data[rows] += noise.view(np.complex64)[..., 0]
            data[rows] *= self.window[rows]
        return data


def build_receiver(anatomy: Anatomy, surround: Surround, noise: float, rng: np.random.Generator) -> Receiver:
    """Draw the coil sensitivity and saturation band for a subject; `noise` is the mean standard deviation."""
    plane = surround.plane
    depth = (surround.skin[:, None] - plane.u).clip(0)
    fall = 0.16 + 1.05 * np.exp(-depth / rng.uniform(95, 130))
    along = 1 / (1 + np.abs((plane.v - rng.normal(0, 10)) / rng.uniform(150, 175)) ** 5)
    waves = _smooth_noise(rng, fall.shape, 4)
    front = np.interp(plane.v, anatomy.curve.v, anatomy.curve.u) - anatomy.half_depth.max()
    line = np.polynomial.Polynomial.fit(plane.v, front - rng.uniform(16, 30), 1)(plane.v)
    keep = rng.uniform(0.25, 0.45)
    band = keep + (1 - keep) * expit((plane.u - line[:, None]) / 3.5)
    sensitivity = (fall * along[:, None] * band * (1 + 0.07 * waves)).astype(np.float32)
    window = np.outer(_fermi(len(plane.v), ACQUIRED[0]), _fermi(len(plane.u), ACQUIRED[1])).astype(np.float32)
    return Receiver(sensitivity, window, noise * float(np.exp(rng.normal(0, 0.15))))


def _fermi(count: int, share: float) -> NDArray[np.float64]:
    frequency = np.abs(fft.fftfreq(count)) * 2
    return np.asarray(expit((share - frequency) / 0.03))


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], nodes: int) -> Field:
    coarse = rng.standard_normal((nodes, nodes), np.float32)
    rows, cols = (spread(np.arange(size, dtype=np.float64) * (nodes - 1) / (size - 1), nodes) for size in shape)
    return enlarge(rows, coarse, cols)


class Grain:
    """Fine multiplicative texture of tissue, drawn anew for every slice."""

    def __init__(self, shape: tuple[int, int], pixel_mm: float) -> None:
        self.mixers = []
        for length_mm, strength in ((1.6, 0.055), (5.0, 0.04)):
            nodes = [int(size * pixel_mm / length_mm) + 3 for size in shape]
            weights = [spread(np.arange(size) * pixel_mm / length_mm, n) for size, n in zip(shape, nodes, strict=True)]
            self.mixers.append((strength, nodes, weights))

    def draw(self, rng: np.random.Generator) -> Field:
        """Return a (rows, columns) float32 field around 1."""
        layers = [
            enlarge(rows, rng.standard_normal(nodes, np.float32) * np.float32(strength), cols)
            for strength, nodes, (rows, cols) in self.mixers
        ]
        return np.asarray(sum(layers, start=np.float32(1)))


def quantise(volume: Field, gain: float) -> NDArray[np.uint16]:
    """Scale magnitudes to stored 12-bit values, clipped at full scale."""
    return np.asarray(np.minimum(volume * np.float32(gain) + np.float32(0.5), FULL_SCALE), np.uint16)
