"""The conclusions of a study in sentences, and the checklist of a fair comparison."""

from collections import Counter

from fitsmall.compressors.naming import printable
from fitsmall.experiments.study.analysis import LARGE, Study

__all__ = ["checklist", "conclusions"]


def conclusions(study: Study) -> list[str]:
    """Sentences that say how often large compressed networks beat others of as many bytes."""
    claims = study.claims()
    sentences = []
    if study.diverged:
        folders = printable(", ".join(study.diverged))
        sentences.append(f"Left out because the error is not finite: {folders}.")
    for rival, name in (
        ("dense", "the best dense one"),
        ("small", "the best of all that are smaller, however compressed,"),
    ):
        comparisons = [claim.compare_with(getattr(claim, rival)) for claim in claims]
        verdicts = Counter(c.verdict for c in comparisons if c)
        sentences.append(
            f"A network of {LARGE} times the bytes or more, compressed, beats {name} of at most "
            f"as many bytes at {verdicts['holds']} of {verdicts.total()} budgets of bytes, loses "
            f"at {verdicts['fails']}, and cannot be told from it at {verdicts['undecided']}."
        )
    return sentences


def checklist(study: Study) -> list[tuple[str, bool]]:
    """Requirements of ShrinkBench (Blalock et al., 2020), and whether the study meets them."""
    compressed = [point for point in study.points if not point.is_dense]
    dense = {point.size for point in study.points if point.is_dense}
    runs = [run for point in study.points for run in point.runs.values()]
    ratios = {round(point.mean("ratio")) for point in compressed}
    return [
        ("compression ratio and theoretical speed-up", all("operations" in run for run in runs)),
        ("a dense network of its own for each size", {p.size for p in compressed} <= dense),
        (f"five operating points or more: {len(ratios)} ratios", len(ratios) >= 5),
        (f"several seeds, with intervals: {study.seeds}", study.seeds >= 3),
        ("random pruning as the floor", any("random" in p.compression for p in compressed)),
    ]
