"""What the words of a report mean."""

from __future__ import annotations

from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Section, Table


def section(comparison: Comparison) -> Section:
    """The last section: a glossary."""
    level = f"{1 - comparison.settings.level:.0%}".replace("%", " %")
    rows = (
        ("arm", "One of the things compared: a model with its settings, trained once per seed."),
        (
            "seed",
            "What a training draws its random numbers from. Runs that differ in it alone show what chance does.",
        ),
        ("AUC", "The chance that a row with the feedback gets a higher score than a row without. .5 is guessing."),
        ("Single-Task", "One model per task that learns nothing from the other tasks: what a joint model must beat."),
        (
            "gain",
            "How much better than Single-Task: the difference of AUC, or of the error. Negative: worse.",
        ),
        ("negative transfer", "A task is worse in a joint model than in a model of its own."),
        ("zone", "The rows where two tasks get about equally much feedback, or one of them far more."),
        (
            "interval",
            "The range in which the true number lies in all likelihood. Other users in the test set, or other seeds, "
            f"would give other numbers; {level} of such intervals hold the true one.",
        ),
        ("undecided", "The difference could be chance. It does not mean that two arms are equally good."),
    )
    return Section(
        key="words",
        title="What the words mean",
        lead="For readers who have not read the papers.",
        blocks=(Table(("word", "meaning"), rows, left=(1,)),),
    )
