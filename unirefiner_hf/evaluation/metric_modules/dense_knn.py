"""Labels found by the nearest tokens of other images, as a module of `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor
from torch.nn import functional

from unirefiner_hf.data.labelled import IGNORE
from unirefiner_hf.evaluation.metric_modules.image_metric import (
    ImageMetric,
    as_tensor,
    require_option,
)
from unirefiner_hf.evaluation.metrics import class_areas, scores_of
from unirefiner_hf.modeling.errors import UniRefinerError

_DESCRIPTION = """\
How well the labels of an image's tokens are found by the nearest tokens of the other images,
one image left out at a time. The nearest, by cosine, vote with exp(cosine / temperature).
Nothing is trained.
"""
_INPUTS = """
Args:
    predictions: of each image its tokens (tokens, channels), such as last_hidden_state[0]; all of
        one number of channels. They are compared in float32.
    references: of each image the label of each token (tokens,), in [0, num_classes) or ignore.

Options, when the metric is loaded:
    num_classes (int): number of classes.
    ignore (int): label of tokens that neither vote nor count; 255 unless set.
    neighbours (int): how many vote; 30 unless set.
    temperature (float): of their votes; 0.02 unless set.
    device: where neighbours are sought; the CPU unless set.

Returns:
    knn_accuracy: share of a class's tokens whose label was found, mean over classes.
    knn_iou: intersection over union of found and true labels, mean over classes.

Raises:
    UniRefinerError: shapes differ, a value is out of range or not finite, there is one image only,
        or the labels of all others are ignored.
"""
_CITATION = """\
@inproceedings{wu2018unsupervised,
    title = {Unsupervised Feature Learning via Non-Parametric Instance Discrimination},
    author = {Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua},
    booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
    year = {2018}
}
@inproceedings{balazevic2023towards,
    title = {Towards In-context Scene Understanding},
    author = {Bala{\\v{z}}evi{\\'c}, Ivana and Steiner, David and Parthasarathy, Nikhil and
        Arandjelovi{\\'c}, Relja and H{\\'e}naff, Olivier J.},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2023}
}
"""


class DenseKnn(ImageMetric):
    """Leave-one-image-out k-NN of dense tokens; see `info.inputs_description`.

    Args:
        num_classes: number of classes.
        ignore: label of tokens that neither vote nor count.
        neighbours: how many tokens vote.
        temperature: of their votes.
        device: where neighbours are sought.
        options: of `evaluate.Metric`.

    Raises:
        UniRefinerError: a value is out of range, or an unknown option.
    """

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        ignore: int = IGNORE,
        neighbours: int = 30,
        temperature: float = 0.02,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> None:
        ok = isinstance(num_classes, int) and num_classes >= 1
        require_option("num_classes", num_classes, ok, "1 or more")
        require_option("neighbours", neighbours, neighbours >= 1, "1 or more")
        require_option("temperature", temperature, temperature > 0, "positive")
        self.num_classes: int = num_classes or 0
        self.ignore = ignore
        self.neighbours, self.temperature = neighbours, temperature
        self.device = device
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    # An image's float32 tokens as they lie in memory: as nested lists
                    # they would be read back as millions of Python objects.
                    "predictions": datasets.Value("large_binary"),
                    "references": [datasets.Value("int64")],
                }
            ),
        )

    def measure(self, prediction: Any, reference: Any) -> tuple[Tensor, Tensor]:
        """Tokens ``(tokens, channels)`` float32 and labels ``(tokens,)``, on the CPU.

        Raises:
            UniRefinerError: a shape or value does not fit.
        """
        tokens = as_tensor(prediction, "prediction", ("tokens", "channels"))
        labels = as_tensor(reference, "label", ("tokens",))
        if not tokens.numel():
            raise UniRefinerError(
                f"An image has tokens of the shape {tuple(tokens.shape)}."
            )
        if len(tokens) != len(labels):
            raise UniRefinerError(
                f"{len(tokens)} tokens do not go with {len(labels)} labels: one a token."
            )
        tokens, labels = tokens.float().cpu(), labels.cpu()
        if not tokens.isfinite().all():
            raise UniRefinerError("Tokens hold values that are not finite.")
        class_areas(labels, labels, self.num_classes, self.ignore)  # Checks the labels.
        return tokens, labels

    def _cells(self, measured: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
        tokens, labels = measured
        return tokens.numpy().tobytes(), labels.tolist()

    def _scores(self, predictions: list, references: list) -> dict[str, Any]:
        if len(predictions) < 2:
            raise UniRefinerError(
                "1 image is too few for dense_knn: neighbours come from other images."
            )
        known = [torch.tensor(labels) for labels in references]
        tokens = [
            _unpacked(packed, len(labels))
            for packed, labels in zip(predictions, known, strict=True)
        ]
        channels = sorted({image.shape[1] for image in tokens})
        if len(channels) > 1:
            raise UniRefinerError(
                f"Tokens have {channels[0]} channels in one image and {channels[1]} in "
                "another: all must be of one backbone."
            )
        bank = [functional.normalize(image.to(self.device), dim=-1) for image in tokens]
        areas = torch.zeros(self.num_classes, 3, dtype=torch.int64)
        for found, truth in zip(self._voted(bank, known), known, strict=True):
            areas += class_areas(found, truth, self.num_classes, self.ignore)
        scores = scores_of(areas.numpy())
        return {"knn_accuracy": scores.mean_accuracy, "knn_iou": scores.mean_iou}

    def _voted(self, tokens: list[Tensor], labels: list[Tensor]) -> Iterator[Tensor]:
        """Class of each token ``(tokens,)`` on the CPU, of one image after another.

        Args:
            tokens: of each image ``(tokens, channels)``, normalised, on the device.
            labels: of each image ``(tokens,)``.
        """
        bank, known = torch.cat(tokens), torch.cat(labels).to(self.device)
        counts = torch.tensor([len(image) for image in labels])
        owner = torch.arange(len(counts)).repeat_interleave(counts).to(self.device)
        usable = known != self.ignore
        for number, query in enumerate(tokens):
            kept = usable & (owner != number)
            others, answers = bank[kept], known[kept]
            if not len(others):
                raise UniRefinerError(
                    f"Every label is {self.ignore}, which is ignored, in all images but "
                    f"number {number}: its tokens have no neighbours."
                )
            count = min(self.neighbours, len(others))
            cosine, nearest = (query @ others.T).topk(count, dim=1)
            weights = ((cosine - cosine[:, :1]) / self.temperature).exp()
            votes = torch.zeros(len(query), self.num_classes, device=self.device)
            votes.scatter_add_(1, answers[nearest], weights)
            yield votes.argmax(dim=1).cpu()


def _unpacked(packed: bytes, count: int) -> Tensor:
    """What `DenseKnn._cells` packed, ``(tokens, channels)`` float32."""
    return torch.frombuffer(bytearray(packed), dtype=torch.float32).view(count, -1)
