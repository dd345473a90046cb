"""How does Muon change a matrix? By its momentum's nearest orthogonal matrix, so that all directions move alike.

Muon (Keller Jordan, 2024): the update is U V' of the momentum's singular value decomposition U S V', taken without
decomposing anything, by a few steps of an odd polynomial that sends every singular value to one. The polynomials are
those of Polar Express (Amsel et al., 2025), which are each optimal for what the step before has left. Matrices of one
shape go through together.
"""

import torch
from torch import Tensor

# Of a x + b x^3 + c x^5, step by step: best for singular values from 1e-3 to 1, with a margin for bf16.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MARGIN = 1.02  # bf16 may let the norm be a little larger than computed


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, rows, columns) of any type -> in bf16, each with its singular values brought near one.

    Zero stays zero.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:  # the products are of the shorter side
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) * MARGIN + 1e-6)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
