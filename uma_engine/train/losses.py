"""What a step minimises, for the candidates of one job: margins (logit of the right label less that of the wrong, and
`loss.prior` of the candidate's prior) and grades.

    pointwise   cross-entropy of the label: a candidate of grade g counts as right with g / (largest grade of the data)
    listwise    cross-entropy between softmax(gains over the job's candidates) and softmax(margins / temperature)   (ListNet)
    pairwise    log(1 + exp(-(margin of the better - margin of the worse))), weighted by the difference of gains     (RankNet)

Knows tensors of one job; does not know models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from uma_engine.train.recipe import Loss

__all__ = ["job_loss"]


def job_loss(margins: Tensor, grades: Tensor, loss: Loss, max_grade: int) -> Tensor:
    """The weighted sum of the terms; margins and grades are [candidates] of one job, the result a scalar in fp32."""
    import torch
    from torch.nn import functional as F

    margins, grades = margins.float(), grades.float()
    gains = torch.exp2(grades) - 1 if loss.gain == "exponential" else grades
    total = margins.new_zeros(())
    if loss.pointwise:
        total = total + loss.pointwise * F.binary_cross_entropy_with_logits(margins, grades / max_grade)
    if loss.listwise and float(gains.sum()) > 0:
        wanted = gains / gains.sum()
        total = total - loss.listwise * (wanted * F.log_softmax(margins / loss.temperature, 0)).sum()
    if loss.pairwise:
        better = gains[:, None] - gains[None, :]
        weights = better.clamp(min=0)
        if float(weights.sum()) > 0:
            difference = margins[:, None] - margins[None, :]
            total = total + loss.pairwise * (weights * F.softplus(-difference)).sum() / weights.sum()
    return total
