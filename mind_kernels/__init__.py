"""Fused losses for distilling many rationales into a large-vocabulary student.

Everything needs torch alone; see README.md for the contract and each function's docstring for formula and shapes.
"""

from mind_kernels.combined import MindLoss, MindLossOutput, mind_loss
from mind_kernels.consistency import AnswerConsistency, answer_consistency
from mind_kernels.cross_entropy import FusedLinearCrossEntropy, fused_linear_cross_entropy
from mind_kernels.kl import TAWeightedKL, ta_weighted_kl
from mind_kernels.linear_kl import FusedLinearKL, fused_linear_kl
from mind_kernels.log_softmax import MultiRationaleLogSoftmax, multi_rationale_log_softmax
from mind_kernels.pruning import GradientPruning, PrunedChunk, record_pruning
from mind_kernels.teachers import Teacher, TeacherHidden, TeacherLogits, TeacherTopK

__all__ = [
    "AnswerConsistency",
    "FusedLinearCrossEntropy",
    "FusedLinearKL",
    "GradientPruning",
    "MindLoss",
    "MindLossOutput",
    "MultiRationaleLogSoftmax",
    "PrunedChunk",
    "TAWeightedKL",
    "Teacher",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherTopK",
    "answer_consistency",
    "fused_linear_cross_entropy",
    "fused_linear_kl",
    "mind_loss",
    "multi_rationale_log_softmax",
    "record_pruning",
    "ta_weighted_kl",
]
