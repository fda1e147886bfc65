"""What the Oulu thesis leaves open, and how a study decides it: one entry per key of the configuration.

Defaults are read from the models of `lbp_ray.study`, so that they stand in one place. ``docs/choices.md`` holds the
same entries for readers, and the report sets them beside what a study did. X numbers are those of that page.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lbp_ray.study import StudyConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Choice:
    """One open point of the thesis and the key that decides it."""

    key: str
    """In a study's configuration, e.g. ``recipe.selection``."""
    reference: str
    """Number of the open point, e.g. ``X15``."""
    section: str
    """Of the thesis."""
    question: str
    options: tuple[tuple[str, str], ...]
    """Value as a configuration file writes it (or what values there are), and what it does."""
    effect: str
    """What it changes."""

    @property
    def default(self) -> Any:  # noqa: ANN401  (any value of a configuration)
        """What a study does unless told otherwise."""
        return _field(self.key).get_default(call_default_factory=True)


def value_in(config: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401
    """Look a dotted key up in a resolved configuration.

    Raises
    ------
    KeyError
        If the configuration does not hold it, as that of a result of an older version.
    """
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def written(value: object) -> str:
    """Write a value as a configuration file does: ``null``, ``true``, ``0.1``, ``fixed_epochs``."""
    return value if isinstance(value, str) else json.dumps(value)


def _field(key: str) -> FieldInfo:
    model: Any = StudyConfig
    *sections, name = key.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    found: FieldInfo = model.model_fields[name]
    return found


CHOICES = (
    Choice(
        "cohort.strict_gt30",
        "X2",
        "3.1",
        "Pain on at least 30 days makes a symptomatic year, but the answers read 8-30 and more than 30 days: where does"
        " day 30 belong?",
        (
            ("false", "30 days given as a number are enough; codes 3 and 4 are"),
            ("true", "only more than 30 days are"),
        ),
        "The group of subjects who gave exactly 30 days; nobody's where the questionnaire holds codes.",
    ),
    Choice(
        "cohort.pfirrmann_zero",
        "X4",
        "3.1",
        "Two discs per level are graded Pfirrmann 0, a grade that the scale does not have: what are they?",
        (
            ("missing", "ungraded discs: where one reader graded, that grade stands, and kappa leaves them out"),
            ("grade", "a grade below 1, which readers can agree or differ on"),
        ),
        "The final grade of discs that one reader graded 0, and the agreement of readers. Such discs are flagged, and"
        " stand in a row of Table 4, either way.",
    ),
    Choice(
        "cohort.adjudication",
        "X28",
        "3.1",
        "Two readers graded every disc: which grade does a disc have where they differ?",
        (
            ("worse", "the higher number"),
            ("better", "the lower number"),
            ("reader_1", "the first reader's"),
            ("missing", "none"),
        ),
        "Table 4. A consensus row in the gradings decides before this key does.",
    ),
    Choice(
        "roi.source",
        "X8",
        "3.2, 4.1",
        "Hand-drawn regions centre 331 crops and predicted ones the other 195: what are crops centred on?",
        (
            ("annotation", "hand-drawn regions: exams without one are not studied"),
            ("model", "masks of networks that never saw the exam's patient, for every exam"),
        ),
        "Which exams are studied. The thesis's mixture is not offered: who was annotated would show in the crop.",
    ),
    Choice(
        "roi.width_px",
        "X10",
        "3.2",
        "A crop is of fixed size, said to be 200 x 400 and that of the network, which takes any: which size?",
        (("1 or more", "columns; rows are `roi.height_px`, and `roi.width_mm` with `roi.height_mm` fix a size in mm"),),
        "How much of the surroundings a network sees, and its computing time.",
    ),
    Choice(
        "roi.slice_pitch_mm",
        "X11",
        "4.2",
        "Neighbours lie 4 mm beside the middle slice, which supposes a thickness of 4 mm without gaps: which are they?",
        (("above 0", "the nearest slices to multiples of this, in mm, within `roi.tolerance_mm`"),),
        "Which slices are a study's third and fifth; exams without them are left out and counted.",
    ),
    Choice(
        "split.holdout_fraction",
        "X5",
        "3.4.1",
        "The test set keeps the share of the symptomatic, yet its figures need 14 of 53 where 11 or 12 are due: how is"
        " it drawn?",
        (
            ("0", "none is kept"),
            ("above 0, below 0.5", "this share of patients, stratified by label, sealed before any training"),
        ),
        "How many patients train, and how sure the final judgement is. 53 exams with 14 positives leave an AUC of 0.74"
        " anywhere between 0.58 and 0.90.",
    ),
    Choice(
        "split.folds",
        "X6",
        "3.4.1",
        "Ten folds were made and one, which scored significantly higher, became the only validation fold: which?",
        (("2 or more", "all of them are trained, evaluated and reported"),),
        "Folds are never picked. Each fold taken alone is reported as a range, since the thesis does not name its own.",
    ),
    Choice(
        "recipe.head",
        "X12",
        "3.4.2",
        "A modified ResNet50 with binary cross-entropy gives probabilities of both classes: one output or two?",
        (
            ("one_logit", "one output and a sigmoid"),
            ("two_logit", "an output per class and a softmax over both"),
        ),
        "The last layer's start and the pace of its training; what it can express is the same.",
    ),
    Choice(
        "recipe.frozen_epochs",
        "X13",
        "3.4.2, 3.5",
        "Training ran 40 epochs with a frozen backbone: how many?",
        (("0 or more", "epochs that train the last layer alone"),),
        "How far the last layer has come when the backbone starts to move.",
    ),
    Choice(
        "recipe.unfrozen_epochs",
        "X13",
        "3.4.2, 3.5",
        "One place plans 100 epochs and stops one after unfreezing, the other lists 41: how many train all weights?",
        (("0 or more", "epochs that train all weights, after the frozen ones"),),
        "How far the backbone adapts, and nearly all of a study's computing time.",
    ),
    Choice(
        "recipe.learning_rate_drop",
        "X13",
        "3.5",
        "The learning rate falls on the 30 epoch: counted from 0 or from 1?",
        (("1 or more", "first epoch, counted from 1, with the late rate; 30 counted from 0 is 31 here"),),
        "One frozen epoch at ten times the rate. The unfrozen epoch has the late rate either way.",
    ),
    Choice(
        "recipe.stop_patience",
        "X13",
        "3.4.2",
        "Training stopped at the lowest loss: by what rule?",
        (
            ("null", "it does not stop early"),
            ("1 or more", "unfrozen epochs without a lower loss on what selects, after which it stops"),
        ),
        "The length of longer runs. It needs a selection other than `fixed_epochs`; with `same_fold` it is optimistic.",
    ),
    Choice(
        "recipe.frozen_batchnorm",
        "X14",
        "3.4.2",
        "Weights before the last layer are frozen; BatchNorm's running statistics are no weights: do they stand still?",
        (
            ("eval", "they stand still: features are constant and computed once"),
            ("train", "they drift, as plain PyTorch code lets them; needs `recipe.feature_cache: false`"),
        ),
        "The features of every frozen epoch. Nothing can be computed once: a study takes some 14 times as long.",
    ),
    Choice(
        "recipe.unfrozen_batchnorm",
        "X14",
        "3.4.2",
        "Do BatchNorm's running statistics move while all weights train?",
        (
            ("eval", "they stand still, and layers normalise by ImageNet's statistics"),
            ("train", "layers normalise by their batch and the statistics drift, as plain PyTorch code lets them"),
        ),
        "The unfrozen epoch: its gradients, and with ``train`` how scores depend on the batch size.",
    ),
    Choice(
        "recipe.adam_at_unfreeze",
        "X14",
        "3.4.2",
        "Does Adam remember the frozen epochs when the backbone joins?",
        (
            ("keep", "the last layer's moments stay"),
            ("reset", "all weights start without moments"),
        ),
        "The size of the first steps after unfreezing.",
    ),
    Choice(
        "recipe.selection",
        "X15",
        "3.4.2",
        "The best checkpoints were those of the best validation results: which exams choose the epoch that scores?",
        (
            ("fixed_epochs", "none: the last epoch scores"),
            ("inner_validation", "a part of the training folds that is held out of training"),
            ("same_fold", "the evaluated fold itself, the literal reading: its scores are optimistic"),
        ),
        "Whether a score can be believed. With `same_fold` no interval, verdict or comparison is made.",
    ),
    Choice(
        "recipe.checkpoint",
        "X15",
        "3.4.2",
        "The best five MCC results before the epoch of minimum loss were saved: what does a selection take?",
        (
            (
                "best_mcc",
                "the largest MCC, at the epoch's own ROC threshold, up to and with the epoch of lowest loss; ties: the"
                " later",
            ),
            ("min_loss", "the lowest loss"),
        ),
        "Which epoch scores; it may be a frozen one. Ignored with `fixed_epochs`.",
    ),
    Choice(
        "recipe.checkpoint_top_k",
        "X15",
        "3.4.2",
        "Five results: one checkpoint of each of five seeds, or five checkpoints of each seed?",
        (("1 or more", "best epochs of each seed whose probabilities are averaged; 5 is the other reading"),),
        "How smooth the scores are; more networks per trial. Ignored with `fixed_epochs`.",
    ),
    Choice(
        "evaluation.threshold_criterion",
        "X16",
        "3.4.2",
        "The optimal threshold is based on the ROC curve: optimal in what?",
        (
            ("youden", "largest recall + specificity"),
            ("closest", "closest to recall 1 and specificity 1"),
            ("g_mean", "largest root of recall times specificity"),
            ("max_mcc", "largest MCC"),
            ("sensitivity", "highest threshold that reaches `evaluation.threshold_target` in recall"),
            ("npv", "highest threshold that reaches `evaluation.threshold_target` in NPV"),
        ),
        "The six metrics of decisions; average precision and ROC-AUC know no threshold.",
    ),
    Choice(
        "evaluation.threshold_level",
        "X16",
        "3.4.2",
        "Is the threshold one of slices or of studies?",
        (
            ("study", "fitted on study scores, after aggregation"),
            ("slice", "fitted on slice scores, before it; with `ensemble_threshold: mean_of_seeds` only"),
        ),
        "Metrics of decisions with several slices: a slice's threshold calls more studies symptomatic, since any of"
        " their slices may pass it.",
    ),
    Choice(
        "evaluation.threshold_source",
        "X16",
        "3.4.2",
        "The threshold was computed on the validation fold: which exams may fit the threshold of a fold?",
        (
            ("cross_fitted", "those of the other folds"),
            ("same_fold", "its own: its decisions are optimistic"),
        ),
        "Whether decisions can be believed. With `same_fold` no interval, verdict or comparison is made.",
    ),
    Choice(
        "evaluation.ensemble_threshold",
        "X17",
        "3.4.2",
        "Results of five models and thresholds were averaged: what is the threshold of averaged scores?",
        (
            ("refit", "fitted on the averaged scores"),
            ("mean_of_seeds", "the mean of the seeds' thresholds"),
        ),
        "Metrics of the averaged scores' decisions. The mean of the seeds' metrics stands beside them.",
    ),
    Choice(
        "evaluation.spread",
        "X18",
        "Table 5",
        "What stands after ± in Table 5 is not said: which spread over seeds?",
        (
            ("sd", "standard deviation"),
            ("se", "standard error, the deviation divided by the root of the number of seeds"),
        ),
        "The figure after ± in tables; files hold both. Neither is an interval over patients.",
    ),
    Choice(
        "recipe.study_rule",
        "X22",
        "3.4.2",
        "A study is symptomatic if any of its slices is predicted so, which multiplies false positives by the slice"
        " count: what is a study's score?",
        (
            ("any", "the largest slice probability, the thesis's rule as a score"),
            ("mean", "the mean"),
            ("top_k", "the mean of the `recipe.study_rule_k` largest"),
            ("noisy_or", "1 - product of 1 - p, as if slices erred independently"),
        ),
        "Every study-level figure with several slices. The report compares the rules at equal false-positive rates.",
    ),
    Choice(
        "evaluation.level",
        "X23",
        "4.2",
        "ROC and precision-recall of three and five slices: over slices or over studies?",
        (
            ("study", "one score per study"),
            ("slice", "one per slice; patients stay the units of intervals"),
        ),
        "Headline metrics and curves; the other level's metrics stand beside them. Slice counts, rules and folds are"
        " compared on studies either way.",
    ),
)
"""In the order of a study; several keys may settle one point."""
