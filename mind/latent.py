"""Do students of different perspectives think differently? The paper's latent analysis.

One student per perspective answers the same questions. The last-layer states over an answer's tokens are averaged, as
Sentence-BERT pools a sentence; a Dirichlet-process Gaussian mixture clusters the answers without being told how many
clusters there are or who wrote which; t-SNE draws them. How far the clusters agree with the perspectives is a number:
adjusted mutual information and adjusted Rand index, 0 in expectation for unrelated partitions, 1 for the same one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mind.data import Record
from mind.evaluation import measure_accuracy
from mind.prompting import PromptFormat, end_of_turn_id
from mind.students import load_student

DIMENSIONS = 16  # principal components that are clustered: a mixture in the student's hidden size has too few answers
MIN_ANSWERS = 8


@dataclass(frozen=True)
class LatentAnalysis:
    """N answers by K students.

    perspectives: K names. labels: (N,) which of them wrote each answer. clusters: (N,) of the mixture.
    points: (N, 2) t-SNE. mutual_information, rand_index: of labels and clusters, adjusted for chance.
    """

    perspectives: tuple[str, ...]
    labels: np.ndarray
    clusters: np.ndarray
    points: np.ndarray
    mutual_information: float
    rand_index: float

    @property
    def num_answers(self) -> int:
        return len(self.labels)

    @property
    def num_clusters(self) -> int:
        return len(set(self.clusters.tolist()))

    def draw(self) -> Figure:
        """The same points twice: coloured by perspective, and by cluster."""
        figure = Figure(figsize=(11, 4.8))
        left, right = figure.subplots(1, 2)
        found = sorted(set(self.clusters.tolist()))
        panels = (
            (left, "who wrote the answer", self.labels, dict(enumerate(self.perspectives))),
            (
                right,
                "the mixture's clusters",
                self.clusters,
                {value: f"cluster {i + 1}" for i, value in enumerate(found)},
            ),
        )
        for axis, title, values, names in panels:
            for i, (value, name) in enumerate(names.items()):
                chosen = self.points[values == value]
                axis.scatter(*chosen.T, s=22, color=f"C{i % 10}", marker="osD^"[i // 10 % 4], alpha=0.8, label=name)
            axis.set_title(title, fontsize=10, loc="left")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=8, frameon=False)
        return figure


def analyse(
    students: Mapping[str, str],
    records: Sequence[Record],
    *,
    prompt_format: PromptFormat,
    max_new_tokens: int = 192,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> LatentAnalysis:
    """Has every student answer every record's question and clusters the answers' states.

    students: the students (built-in name, folder or hub id) by perspective, at least two, of one hidden size.

    Raises: ValueError when there are too few students or answers, a student cannot be used, or scikit-learn is missing.
    """
    _require_scikit_learn()
    if len(students) < 2:
        raise ValueError(f"latent: given {len(students)} student, wanted at least two, one for each perspective")
    if len(students) * len(records) < MIN_ANSWERS:
        raise ValueError(
            f"latent: {len(students)} students × {len(records)} questions, wanted at least {MIN_ANSWERS} answers"
        )
    # Now, not when the students before it have answered.
    sizes = {name: load_student(source)[0].config.get_text_config().hidden_size for name, source in students.items()}
    first, *_ = sizes.values()
    for name, size in sizes.items():
        if size != first:
            raise ValueError(
                f"latent: the student of {name} has the hidden size {size}, the first one's is {first}, "
                "wanted students of one model"
            )
    states: list[Tensor] = []
    for source in students.values():
        model, tokenizer = load_student(source)
        model.to(device)  # type: ignore[arg-type]
        result = measure_accuracy(
            model,
            tokenizer,
            records,
            prompt_format=prompt_format,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        prompts = [prompt_format.prompt_ids(tokenizer, record.question) for record in records]
        states.append(answer_states(model, tokenizer, prompts, result.outputs, batch_size=batch_size))
    return cluster(
        torch.cat(states).numpy(), np.repeat(np.arange(len(students)), len(records)), tuple(students), seed=seed
    )


@torch.no_grad()
def answer_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    answers: Sequence[str],
    *,
    batch_size: int = 16,
) -> Tensor:
    """(len(answers), H) fp32, on the CPU: the mean last-layer state over each answer's tokens and its end of turn.

    prompts: token ids of each answer's question. The answers are tokenised again; what would go beyond the model's
        positions is left out.
    """
    end = end_of_turn_id(tokenizer)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    targets = []
    for prompt, answer in zip(prompts, answers, strict=True):
        target = [*tokenizer(answer, add_special_tokens=False, split_special_tokens=True).input_ids, end]
        targets.append(target if positions is None else target[: positions - len(prompt)])
    model.eval()
    rows = []
    for start in range(0, len(answers), batch_size):
        batch = list(zip(prompts[start : start + batch_size], targets[start : start + batch_size], strict=True))
        width = max(len(prompt) + len(target) for prompt, target in batch)
        input_ids = torch.full((len(batch), width), end)
        inside, pooled = torch.zeros(len(batch), width), torch.zeros(len(batch), width)
        for i, (prompt, target) in enumerate(batch):
            length = len(prompt) + len(target)
            input_ids[i, :length] = torch.tensor(prompt + target)
            inside[i, :length] = 1
            pooled[i, len(prompt) : length] = 1 / len(target)
        output = model(
            input_ids=input_ids.to(model.device),
            attention_mask=inside.long().to(model.device),
            output_hidden_states=True,
            logits_to_keep=1,
        )
        # (batch, 1, width) @ (batch, width, H) -> (batch, 1, H)
        rows.append((pooled[:, None] @ output.hidden_states[-1].float().cpu())[:, 0])
    return torch.cat(rows)


def cluster(states: np.ndarray, labels: np.ndarray, perspectives: tuple[str, ...], *, seed: int = 0) -> LatentAnalysis:
    """Clusters and projects the states (N, H) whose perspectives are `labels` (N,).

    Raises: ValueError when there is nothing to tell the states apart by, or scikit-learn is missing.
    """
    _require_scikit_learn()
    if not np.isfinite(states).all() or (states == states[0]).all():
        raise ValueError("latent: the answers' states are all the same, or NaN or Inf, wanted states that differ")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
    from sklearn.mixture import BayesianGaussianMixture

    reduced = PCA(min(DIMENSIONS, *states.shape), random_state=seed).fit_transform(states.astype(np.float64))
    reduced /= reduced.std(0).max() or 1.0  # one scale for all: the mixture's priors are not scale-free
    mixture = BayesianGaussianMixture(
        n_components=min(2 * len(perspectives), len(states) // 2),  # an upper bound: the process empties what it can
        covariance_type="diag",
        weight_concentration_prior_type="dirichlet_process",
        n_init=3,
        max_iter=2000,
        random_state=seed,
    )
    clusters = mixture.fit_predict(reduced)
    perplexity = min(30.0, (len(states) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return LatentAnalysis(
        perspectives,
        labels,
        clusters,
        points,
        float(adjusted_mutual_info_score(labels, clusters)),
        float(adjusted_rand_score(labels, clusters)),
    )


def _require_scikit_learn() -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError("mind report --latent needs scikit-learn, which is not installed: pip install scikit-learn")
