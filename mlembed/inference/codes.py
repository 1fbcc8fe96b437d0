"""Compare vectors as they are stored in bytes and bits.

    int8     round(x / s), s = largest |x| / 127: sentence-transformers' codes for ranges that are
             symmetric and equal in all dimensions, so that products of codes are those of vectors
             divided by s^2, and any index of bytes ranks by them
    binary   the sign of every number; D minus twice the Hamming distance is the product of signs

Letters: N texts, D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .vector_files import Quantiser

FLOAT = "float32"


def symmetric_range(largest: float) -> tuple[float, float]:
    """Return the range, of every dimension, whose codes are round(x / s), s = largest / 127.

    Code c stands for the numbers from (c - 1/2) s to (c + 1/2) s, so -128 begins at -128.5 s, and
    sentence-transformers divides a range into 255 steps.
    """
    step = max(largest, 1e-30) / 127
    return -128.5 * step, 126.5 * step


@dataclass
class Coder:
    """Convert unit vectors fp32 [N, D] to vectors whose products are the scores of their codes.

    int8 codes are scaled to length one, so that products are cosines. Signs are 1 and -1, so that
    equal distances have equal scores to the last bit.

    precision: float32, which changes nothing, int8 or binary. largest: absolute value that int8
    codes reach; by default that of the first vectors.
    """

    precision: str = FLOAT
    largest: float = 0.0

    def fit(self, *parts: Tensor) -> None:
        """Take `largest` from vectors, if there is none yet."""
        if self.precision == "int8" and not self.largest:
            self.largest = max((float(part.abs().max()) for part in parts if len(part)), default=0)

    def __call__(self, unit_ND: Tensor) -> Tensor:
        if self.precision == FLOAT:
            return unit_ND
        if self.precision == "binary":
            return torch.where(unit_ND > 0, 1.0, -1.0)
        self.fit(unit_ND)
        ends = np.array(symmetric_range(self.largest), np.float32)
        quantise = Quantiser("int8", np.repeat(ends[:, None], unit_ND.shape[1], axis=1))
        codes = torch.from_numpy(quantise(unit_ND.cpu().numpy()))
        return F.normalize(codes.float(), dim=-1).to(unit_ND.device)

    def reached(self) -> dict[str, float]:
        """Return `largest` by its name, {} for other codes than int8."""
        return {"largest": self.largest} if self.precision == "int8" else {}
