"""What ECAC computes in plain tensors: means of features per class, class weights, and its losses.

Labels are integers on the features' grid; those outside 0 .. K - 1 are ignored. B batch, K classes, d width, N = h w.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6


def class_sums(
    features: Tensor, labels: Tensor, num_classes: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums (K, d) of rows (P, d) per label (P,), and the total weight (K,) of each; float32, labels beyond K left out."""
    valid = (labels >= 0) & (labels < num_classes)
    rows, index = features[valid].float(), labels[valid]
    weight = rows.new_ones(len(rows)) if weights is None else weights[valid].float()
    sums = rows.new_zeros(num_classes, rows.shape[1]).index_add(0, index, rows * weight[:, None])
    return sums, rows.new_zeros(num_classes).index_add(0, index, weight)


def class_centres(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature (B, K, d) of each class in each image, zero where absent, and which classes are there (B, K).

    Features are (B, d, h, w), labels (B, h, w) on the same grid; ids outside 0 .. K - 1 are ignored.
    """
    batch = len(features)
    known = (labels >= 0) & (labels < num_classes)
    offsets = num_classes * torch.arange(batch, device=labels.device)[:, None, None]
    index = torch.where(known, labels + offsets, -1)
    sums, totals = class_sums(feature_rows(features), index.flatten(), batch * num_classes)
    centres = (sums / totals.clamp_min(1)[:, None]).view(batch, num_classes, -1)
    return centres, (totals > 0).view(batch, num_classes)


def soft_centres(features: Tensor, coarse: Tensor) -> Tensor:
    """Means (B, K, d) of features (B, d, h, w) weighted by the softmax over classes of coarse logits (B, K, h, w)."""
    # The softmax over pixels of log-probabilities divides each class by its sum, however small that is.
    share = coarse.flatten(2).float().log_softmax(dim=1).softmax(dim=2)  # B, K, N
    return share.to(features.dtype) @ features.flatten(2).transpose(1, 2)


def classify(classifiers: Tensor, features: Tensor, cosine_scale: float = 0.0) -> Tensor:
    """Logits (B, K, h, w) of features (B, d, h, w) under classifiers (B, K, d): products, or cosines times a scale above 0."""
    if cosine_scale:
        classifiers, features = (F.normalize(part, dim=axis) for part, axis in ((classifiers, 2), (features, 1)))
    logits = (classifiers @ features.flatten(2)).view(len(features), -1, *features.shape[2:])
    return cosine_scale * logits if cosine_scale else logits


def class_weights(frequencies: Tensor, rho: float) -> Tensor:
    """w_c = f_c^-rho / sum_k f_k^-rho, float32 (K,); 0 for a class that never occurs."""
    occurs = frequencies > 0
    raw = torch.where(occurs, torch.where(occurs, frequencies, 1.0).double() ** -rho, 0.0)
    return (raw / raw.sum()).float()


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of the cross-entropy over labelled pixels; 0 where there are none.

    Logits are (B, K, ...), labels (B, ...); ids outside 0 .. K - 1 are ignored. Weights (K,) are divided by their sum over
    pixels (*inferred*), so that their scale does not matter; looked at: thesis ch. 4, torch's cross-entropy, which divides so,
    and mmseg's, which divides by the number of pixels.
    """
    num_classes = logits.shape[1]
    valid = (labels >= 0) & (labels < num_classes)
    loss = F.cross_entropy(logits.float(), torch.where(valid, labels, 0), reduction="none")
    scale = valid.float() if weights is None else weights[torch.where(valid, labels, 0)] * valid
    return (loss * scale).sum() / scale.sum().clamp_min(torch.finfo(torch.float32).tiny)


def kl_loss(student: Tensor, teacher: Tensor, labels: Tensor, hard: float = 0.0) -> Tensor:
    """KL(teacher || student), weighted by teacher entropy within each class, averaged over classes present (Eq. 4.12).

    Args:
        student: Logits (B, K, h, w).
        teacher: Logits (B, K, h, w); get no gradient.
        labels: (B, h, w) on the same grid.
        hard: Share of the label itself in the teacher's distribution, as CAC has .5 of it.
    """
    num_classes = student.shape[1]
    log_t = teacher.detach().float().log_softmax(dim=1)
    log_s = student.float().log_softmax(dim=1)
    entropy = -(log_t.exp() * log_t).sum(dim=1).flatten()
    target = log_t.exp()
    if hard:
        known = (labels >= 0) & (labels < num_classes)
        own = F.one_hot(torch.where(known, labels, 0), num_classes).permute(0, 3, 1, 2)
        target = (1 - hard) * target + hard * own
    divergence = (torch.xlogy(target, target) - target * log_s).sum(dim=1).flatten()
    sums, totals = class_sums(divergence[:, None], labels.flatten(), num_classes, entropy + EPS)
    present = totals > 0
    per_class = sums[:, 0] / torch.where(present, totals, 1.0)
    return per_class.sum() / present.sum().clamp_min(1)


def iv_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mean squared difference of the two cosine maps of logits (B, K, h, w) to their own class centres; teacher fixed."""
    valid = (labels >= 0) & (labels < student.shape[1])
    difference = cosine_map(student, labels) - cosine_map(teacher.detach(), labels)
    return (difference.square() * valid).sum() / valid.sum().clamp_min(1)


def cosine_map(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cosine (B, h, w) of each pixel's logits (B, K, h, w) to the mean of its class in its image."""
    num_classes = outputs.shape[1]
    centres, _ = class_centres(outputs, labels, num_classes)  # B, K, K
    index = torch.where((labels >= 0) & (labels < num_classes), labels, 0).flatten(1)
    own = centres.gather(1, index[..., None].expand(-1, -1, num_classes))  # B, N, K
    cosine = F.cosine_similarity(outputs.flatten(2).transpose(1, 2).float(), own, dim=2, eps=EPS)
    return cosine.view(labels.shape)


def memory_loss(logits: Tensor, seen: Tensor) -> Tensor:
    """Cross-entropy of the coarse classifier's logits (K, K) on the memory rows, each its own class; seen rows only."""
    own = torch.arange(len(seen), device=seen.device)
    return cross_entropy(logits, torch.where(seen, own, -1))


def feature_rows(features: Tensor) -> Tensor:
    """Features (B, d, h, w) as rows (B h w, d)."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)  # B*h*w, d
