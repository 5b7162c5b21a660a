"""ImageNet-C: how often corrupted pictures are told wrong by a classifier that has seen clean ones alone, beside AlexNet's errors.

Here: the protocol, the mean corruption error.
Not here: where the pictures lie, the classifier (other_pictures.py), patches that we drop ourselves (occlusion.py).
Source: arXiv 1903.12261. AlexNet's errors, which hendrycks/robustness only links to, from google-research/augmix, commit 9b9824c,
imagenet.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from wherefrom.pipeline.laws import Center
from wherefrom.train.evaluation.features import CORRUPTED, SUMMARY, Evaluation, Part
from wherefrom.train.evaluation.other_pictures import CORRUPTIONS, SEVERITIES, ClassifierName, FrozenClassifier, frozen_classifiers
from wherefrom.train.evaluation.protocols import Need, NotMeasuredError, Score, check_part

ALEXNET_ERRORS = {  # means over the five severities
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Corruptions:
    """Corrupted pictures are shown whole, for they are cut to 224 px already; clean ones as Resize(256) and CenterCrop(224) show them.

    The classifier: k-NN, or one-vs-rest ridge regression, of clean training pictures; no corrupted picture shapes it. Pictures of
    classes that no training picture shows are left out.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("labels", "training pictures", "corrupted pictures")
    part: Part = SUMMARY
    head: ClassifierName = "k-NN"
    k: int = 20
    temperature: float = 0.07

    @property
    def parts(self) -> tuple[Part, ...]:
        """The part that it measures."""
        return (self.part,)

    def measure(self, evaluation: Evaluation) -> Iterator[Score | NotMeasuredError]:
        """Yield the clean error, the mean corruption error and that of every corruption, in percent; of fewer than 15, their mean."""
        lacking = dict(self._lacking(evaluation))
        corruptions = [name for name, reason in lacking.items() if not reason]
        yield from (NotMeasuredError(reason) for reason in lacking.values() if reason)
        if not corruptions:
            return
        check_part(evaluation, self.part)
        held_out = evaluation.labeled("held_out", self.part)
        classifiers = frozen_classifiers(evaluation, self.part, head=self.head, k=self.k, temperature=self.temperature)
        accuracies: dict[str, dict[str, list[float]]] = {column: {} for column in classifiers}
        for name in corruptions:
            try:
                for column, of_severities in self._accuracies(evaluation, name, classifiers).items():
                    accuracies[column][name] = of_severities
            except NotMeasuredError as problem:
                yield problem
        for column, classifier in classifiers.items() if any(accuracies.values()) else ():
            if len(held_out.labels):
                wrong = classifier.tell(held_out.features[column]) != held_out.labels
                yield Score(row="clean error, %", features=column, value=100 * float(wrong.double().mean()), better="lower")
            errors = corruption_errors(accuracies[column])
            mean = "mCE, %" if len(errors) == len(CORRUPTIONS) else f"mean CE of {len(errors)} corruptions, %"
            yield Score(row=mean, features=column, value=sum(errors.values()) / len(errors), better="lower")
            for name, error in errors.items():
                yield Score(row=f"CE {name}, %", features=column, value=error, better="lower")

    def _accuracies(self, evaluation: Evaluation, corruption: str, classifiers: Mapping[str, FrozenClassifier]) -> dict[str, list[float]]:
        """Return how often each classifier is right about a corruption at every severity.

        Raises: NotMeasuredError if one shows no class that they know.
        """
        accuracies: dict[str, list[float]] = {column: [] for column in classifiers}
        for severity in SEVERITIES:
            pictures = evaluation.labeled_elsewhere(f"{CORRUPTED}/{corruption}/{severity}", self.part, law=Center())
            known = pictures.labels >= 0
            if not bool(known.any()):
                raise NotMeasuredError(f"{CORRUPTED}/{corruption}/{severity} shows no class of the training pictures")
            for column, classifier in classifiers.items():
                told = classifier.tell(pictures.features[column][known])
                accuracies[column].append(float((told == pictures.labels[known]).double().mean()))
        return accuracies

    def _lacking(self, evaluation: Evaluation) -> Iterator[tuple[str, str]]:
        """Yield the corruptions that there are pictures of, each with what of it is missing, "" if nothing is."""
        names = [name for name in CORRUPTIONS if any(other.startswith(f"{CORRUPTED}/{name}/") for other in evaluation.others)]
        if not names:
            raise NotMeasuredError(f"there are no corrupted pictures; name the folder of {CORRUPTED}")
        for name in names:
            missing = [severity for severity in SEVERITIES if f"{CORRUPTED}/{name}/{severity}" not in evaluation.others]
            reason = f"{CORRUPTED}/{name} lacks severity {missing[0]}, and AlexNet's error is of all five" if missing else ""
            yield name, reason


def corruption_errors(accuracies: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the error of every corruption in percent of AlexNet's, of the accuracy at each of its severities; mCE is their mean."""
    return {name: 100 * (1 - sum(values) / len(values)) / ALEXNET_ERRORS[name] for name, values in accuracies.items()}
