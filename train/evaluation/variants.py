"""ImageNet-R, -A and -Sketch: the same classes drawn, odd or sketched, told by a classifier that has seen ordinary pictures alone.

Here: the protocol.
Not here: where the pictures lie, the classifier (other_pictures.py).
Source: eval.py of hendrycks/imagenet-r (arXiv 2006.16241) and of hendrycks/natural-adv-examples (arXiv 1907.07174): of 1000 classes only
those are answered that the set has; of ImageNet-Sketch (arXiv 1905.13549), which has all, all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from wherefrom.train.evaluation.features import CHANCE, ENCODER, SUMMARY, VARIANTS, Evaluation, Part
from wherefrom.train.evaluation.other_pictures import ClassifierName, frozen_classifiers
from wherefrom.train.evaluation.protocols import Need, NotMeasuredError, Score, check_part


@dataclass(frozen=True, kw_only=True, slots=True)
class Variants:
    """All pictures as Resize(256) and CenterCrop(224) show them; a classifier of training pictures, k-NN or one-vs-rest ridge regression.

    Answers are restricted to the classes that a set and the training pictures share; the set's other pictures are left out, and how many
    these are is said. k-NN asks the training pictures of those classes alone.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("labels", "training pictures", "variants")
    part: Part = SUMMARY
    head: ClassifierName = "k-NN"
    k: int = 20
    temperature: float = 0.07

    @property
    def parts(self) -> tuple[Part, ...]:
        """The part that it measures."""
        return (self.part,)

    def measure(self, evaluation: Evaluation) -> Iterator[Score | NotMeasuredError]:
        """Yield top-1 on every set that there is, and on held-out pictures of the same classes."""
        names = [name for name in VARIANTS if name in evaluation.others]
        if not names:
            raise NotMeasuredError(f"there are no such pictures; name the folder of {', '.join(VARIANTS)}")
        check_part(evaluation, self.part)
        train = evaluation.labeled("train", self.part)
        held_out = evaluation.labeled("held_out", self.part)
        classifiers = frozen_classifiers(evaluation, self.part, head=self.head, k=self.k, temperature=self.temperature)
        for name in names:
            pictures = evaluation.labeled_elsewhere(name, self.part)
            known = torch.isin(pictures.labels, train.labels)
            among = pictures.labels[known].unique()
            if not len(among):
                yield NotMeasuredError(f"{name} shows no class of the training pictures")
                continue
            own = torch.isin(held_out.labels, among)
            for column, classifier in classifiers.items():
                told = classifier.tell(pictures.features[column][known], among)
                yield Score(row=name, features=column, value=float((told == pictures.labels[known]).double().mean()))
                if bool(own.any()):
                    told = classifier.tell(held_out.features[column][own], among)
                    right = float((told == held_out.labels[own]).double().mean())
                    yield Score(row=f"{name}: held-out, {len(among)} classes", features=column, value=right)
            yield Score(row=name, features=CHANCE, value=1 / len(among))
            if not bool(known.all()):
                share = float((~known).double().mean())
                yield Score(row=f"{name}: of other classes, left out", features=ENCODER, value=share, better="neither")
