"""Schedules of ten steps that Align Your Steps has found for well-known models (Sabour et al., 2024, table 3).

Noise levels s = sigma / alpha from noise to data. A network is asked at the first ten; the eleventh is where the last
step ends by the paper, in whose place solvers put clean data, here as in the libraries that ship these lists.
"""

from __future__ import annotations

import math

# sd15: Stable Diffusion 1.5. sdxl: Stable Diffusion XL. deepfloyd: DeepFloyd IF, its first stage. svd: Stable Video
# Diffusion.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "sd15":      (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl":      (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd":       (700.00, 54.50, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip


def published_stops(name: str) -> tuple[float, ...]:
    """Log SNRs of a published schedule, rising: ten levels and the end of the last step."""
    return tuple(-2 * math.log(noise) for noise in PUBLISHED[name])
